"""One HTML page and one Markdown file of all runs under STORE."""

from typing import Any

from pipeline import report
from pipeline.config import Report
from pipeline.show import Show
from store import files
from store.errors import Refused


def run(config: Report, show: Show) -> dict[str, Any]:
    """The command `report`."""
    data = report.gather(config.store.home)
    if not data["tasks"]:
        why = f"; {data['damaged'][0]}" if data["damaged"] else ""
        raise Refused(f"there are no runs under {config.store.home}; `readcache train` or `sweep` makes some{why}")
    made = {"html": config.store.home / "report.html", "markdown": config.store.home / "report.md"}
    files.write(made["html"], report.html(data).encode())
    files.write(made["markdown"], report.markdown(data).encode())
    best = {name: task["runs"][0] for name, task in data["tasks"].items()}
    show.table(
        ["task", "runs", "metric", "majority", "linear probe", "READ", "best run"],
        [[name, len(data["tasks"][name]["runs"]), row["metric"], row["majority"], row["linear_probe"], row["score"], row["run"]]
         for name, row in best.items()],
    )  # fmt: skip
    for text in data["damaged"]:
        show.line(text)
    show.line(f"{made['html']} and {made['markdown']}")
    told = {name: {"run": row["run"], "metric": row["metric"], "score": row["score"]} for name, row in best.items()}
    return {kind: str(path) for kind, path in made.items()} | {"best": told, "damaged": data["damaged"]}
