"""Race two processes of one thread against one of two threads, for each axis, on the default shape (with four
heads, which divide by two), and check that the planner has four layouts in the measured order.

    python tests/race_parallel.py data/python [ROUNDS]

Every run trains the micro preset for some steps; runs take turns. Prints tokens a second (medians of the last
steps), the ratio to one process, and the planner's estimate from speeds that were measured a moment before.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import parallel  # noqa: F401 (before torch)
import torch
from model import PRESETS
from parallel import Layout, Machine, step_seconds

STEPS = 6
STEP = ["--max-steps", 1000, "--tokens-per-step", 16_384, "--eval-interval", 1000, "--save-interval", 1000,
        "--dtype", "fp32", "--compile", "off", "--device", "cpu",
        "--set", "n_head=4", "--set", "n_kv_head=4", "--set", "head_dim=48"]  # three heads do not divide by two
EXPERTS = ["--set", "n_expert=4", "--set", "expert_dim=256"]
RUNS = {
    "one process": [],
    "dp 2": [],
    "dp 2, ZeRO-2": ["--zero", 2],
    "tp 2": ["--tp", 2],
    "pp 2 (1f1b, 8 micro-batches)": ["--pp", 2, "--micro-batch", 8],
    "cp 2": ["--cp", 2],
    "one process, experts": EXPERTS,
    "ep 2, experts": [*EXPERTS, "--ep", 2],
    "tp 2, experts": [*EXPERTS, "--tp", 2],
}
LAYOUTS = {"dp 2": Layout(dp=2), "tp 2": Layout(tp=2), "cp 2": Layout(cp=2), "pp 2": Layout(pp=2)}


def tokens_per_second(name: str, data: str) -> float:
    """Begin a training, read the median of its steps but the first two, and stop it."""
    with tempfile.TemporaryDirectory() as folder:
        args = ["--data", data, "--out", f"{folder}/run", *STEP, *RUNS[name]]
        one = name.startswith("one")
        launch = ["train.py"] if one else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                                           "parallel.py"]
        threads = {"OMP_NUM_THREADS": "2" if one else "1"}
        command = [sys.executable, *map(str, [*launch, *args])]
        with open(f"{folder}/err", "w") as err:
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | threads, stdout=err, stderr=err)
        path, rates = Path(folder, "run", "metrics.jsonl"), []
        while len(rates) < STEPS:
            time.sleep(0.2)
            if process.poll() is not None:
                raise SystemExit(Path(folder, "err").read_text()[-2000:])
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            rates = [json.loads(line).get("tok_per_s") for line in lines if line.endswith("\n")]
        process.send_signal(signal.SIGINT)
        process.wait()
        return statistics.median(rates[2:STEPS])


def gloo_speed() -> float:
    """Measure the bytes a second that two processes exchange."""
    code = ("import torch, time, torch.distributed as d; d.init_process_group('gloo'); x = torch.ones(2**22);"
            "d.all_reduce(x); t = time.perf_counter(); [d.all_reduce(x) for _ in range(10)];"
            "print(x.nbytes * 10 / (time.perf_counter() - t)); d.destroy_process_group()")
    args = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable]
    done = subprocess.run([sys.executable, *args, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main(data: str, rounds: str = "3") -> None:
    found = {name: [] for name in RUNS}
    for _ in range(int(rounds)):
        for name in RUNS:
            found[name].append(tokens_per_second(name, data))
    rate = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        one = rate["one process, experts" if "experts" in name else "one process"]
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"{name:30} {rate[name]:9,.0f} tok/s ({spread}), {rate[name] / one:.2f} times one process")

    vocab = json.loads(Path(data, "meta.json").read_text())["vocab_size"]
    config = PRESETS["micro"].replace(vocab_size=-(-vocab // 64) * 64, n_head=4, n_kv_head=4, head_dim=48)
    speed = gloo_speed()
    peak = 6 * parallel.count_params(config)[0] * rate["one process"] / 2  # of one thread, as it trains
    machine = Machine(2, 24e9, peak, 1.0, speed, itemsize=4)
    print(f"gloo {speed / 1e9:.2f} GB/s; a step of 16,384 tokens by the planner, and measured:")
    windows = 16_384 // config.seq_len
    planned, measured = {}, {}
    for name, layout in LAYOUTS.items():
        m = 8 if layout.pp > 1 else windows // layout.dp // 32
        planned[name] = sum(step_seconds(config, layout, machine, windows // layout.dp // m, m, False).values())
        run = next(run for run in RUNS if run.startswith(name))
        measured[name] = 16_384 / rate[run]
        print(f"  {name:6} {planned[name]:.3f} s, {measured[name]:.3f} s")
    orders = [sorted(times, key=times.get) for times in (planned, measured)]
    print(f"order by the planner {orders[0]}, measured {orders[1]}")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*sys.argv[1:])
