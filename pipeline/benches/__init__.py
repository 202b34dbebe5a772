"""What `readcache bench` measures. Peers and baselines are timed in the same run on the same data, in turn with our own."""
