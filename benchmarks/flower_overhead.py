"""What a round over Flower costs beyond its training: warmfed beside an empty Flower app that sends the same bytes.

Both run on one deployment: a SuperLink and four SuperNodes on this machine, with TLS and node keys. A round of warmfed is
FedAvg of the small CNN with one step of training, and the measuring after it: two exchanges with each site. The empty app's
round is two exchanges of messages with as many bytes, there and back; its client imports nothing but Flower (`empty`), or
PyTorch too, as any client that trains does (`torch`).

    python benchmarks/flower_overhead.py [--rounds 5] [--out benchmarks/results/flower_overhead.json]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomli_w
from deployment import Deployment, arrays

from warmfed.transports.flower_project import write_project
from warmfed.utils.files import atomic_write, read_lines, write_json

SITES = ("a", "b", "c", "d")
_CLIENT = """\
{imports}
from flwr.app import Array, ArrayRecord, RecordDict, Message
from flwr.clientapp import ClientApp

app = ClientApp()


def answer(message, context):
    size = message.content["up"]["bytes"]
    array = Array(dtype="uint8", shape=(size,), stype="bytes", data=bytes(size))
    return Message(RecordDict({{"message": ArrayRecord({{"message": array}})}}), reply_to=message)


app.train()(answer)
app.evaluate()(answer)
"""
_SERVER = """\
import json
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict, Message
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    plan = json.loads(Path(context.run_config["config"]).read_text())
    seconds = []
    while len(list(grid.get_node_ids())) < plan["sites"]:
        time.sleep(0.1)
    for _ in range(plan["rounds"]):
        began = time.perf_counter()
        for action, (down, up) in plan["exchanges"].items():
            array = Array(dtype="uint8", shape=(down,), stype="bytes", data=bytes(down))
            records = {"message": ArrayRecord({"message": array}), "up": ConfigRecord({"bytes": up})}
            pending = set(grid.push_messages([Message(RecordDict(records), node, action) for node in grid.get_node_ids()]))
            while pending:
                pending -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(list(pending))}
                time.sleep(0.1)
        seconds.append(time.perf_counter() - began)
    Path(context.run_config["out"]).write_text(json.dumps(seconds))
"""


def ours(deployment: Deployment, config: dict[str, Any]) -> tuple[list[float], dict[str, tuple[int, int]]]:
    """Seconds of each round beyond the longest training in it, and the bytes down and up of its exchanges."""
    atomic_write(deployment.server / "run.toml", tomli_w.dumps(config))
    deployment.start("run.toml", "runs/ours")
    deployment.finished("runs/ours", 900)
    lines = read_lines(deployment.server / "runs" / "ours" / "ledger.jsonl", "the ledger")
    seconds = []
    for step in sorted({line["step"] for line in lines}):
        here = [line for line in lines if line["step"] == step]
        whole = next(line["seconds"] for line in here if "site" not in line)
        seconds.append(whole - max(line["seconds"] for line in here if line.get("direction") == "up"))
    model = max(line["bytes"] for line in lines if "site" in line)
    # the measuring sends the last message and the global model, and gets some numbers
    return seconds, {"train": (model, model), "evaluate": (2 * model, 1000)}


def empty(deployment: Deployment, name: str, imports: str, rounds: int, exchanges: dict[str, tuple[int, int]]) -> list[float]:
    """Seconds of each round of the empty app."""
    app = write_project(deployment.folder / name)
    pyproject = app / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('"warmfed-app"', f'"empty-{name}"'))
    (app / "warmfed_app" / "client_app.py").write_text(_CLIENT.format(imports=imports))
    (app / "warmfed_app" / "server_app.py").write_text(_SERVER)
    plan, out = deployment.folder / f"{name}.json", deployment.folder / f"{name}-seconds.json"
    write_json(plan, {"sites": len(SITES), "rounds": rounds, "exchanges": exchanges})
    deployment.start(str(plan), str(out), app)
    deployment.wait(out.exists, 900, f"{name} has finished")
    return list(json.loads(out.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = {
            "algorithm": {"name": "fedavg", "rounds": args.rounds, "local": {"steps": 1}},
            "server": {"sites": list(SITES), "stage_timeout": 300.0},
            "data": {"source": str(arrays(folder / "data.npz", SITES))},
        }
        (folder / "run.toml").write_text(tomli_w.dumps(config))
        with Deployment(folder / "all", folder / "run.toml", SITES, {"data": config["data"]}) as deployment:
            deployment.superlink()
            for site in SITES:
                deployment.supernode(site)
            seconds, exchanges = ours(deployment, config)
            found = {"warmfed": seconds}
            for name, imports in (("empty", ""), ("torch", "import torch")):
                found[name] = empty(deployment, name, imports, args.rounds, exchanges)
    median: dict[str, float] = {name: round(statistics.median(values), 2) for name, values in found.items()}
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} processors", "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("warmfed", "flwr", "torch")},
        "bytes": {name: {"down": down, "up": up} for name, (down, up) in exchanges.items()},
        "seconds": {name: [round(value, 2) for value in values] for name, values in found.items()}, "median": median,
        **{f"times_{name}": round(median["warmfed"] / median[name], 2) for name in ("empty", "torch")},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
