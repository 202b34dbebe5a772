"""What happens to a datum: value to value. No argv, no dask; importing the package loads neither torch nor transformers."""
