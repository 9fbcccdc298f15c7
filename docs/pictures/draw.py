"""The drawings of README and docs: ``python docs/pictures/draw.py`` makes them anew, from two real runs (minutes)."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import safetensors.torch
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KILL_AT, STEPS, EVERY = 150, 260, 40
"""The step at which a worker is killed, the steps of a run, and those between checkpoints."""
INK, SOFT, BLUE, RED = "#1f2933", "#7b8794", "#2563eb", "#dc2626"

ROAD = (
    ("record", "Ray Data\npyarrow"),
    ("session", "exact\ndeduplication"),
    ("example", "Parquet\non S3"),
    ("batch", "Ray Data\npacked"),
    ("loss", "PyTorch"),
    ("state", "DeepSpeed\nRay Train"),
    ("checkpoint", "safetensors"),
    ("reply", ""),
)
"""What a raw line becomes, and what takes it to the next step."""


def main() -> None:
    """Draws all of them."""
    plt.rcParams["svg.hashsalt"] = "arplus"  # the same drawing gives the same file
    draw_road(HERE / "road.svg")
    with tempfile.TemporaryDirectory() as folder:
        draw_runs(Path(folder), HERE / "killed_run.svg")


def draw_road(target: Path) -> None:
    """The road of the data, with the library at each arrow."""
    figure, axes = plt.subplots(figsize=(13, 1.6))
    axes.set(xlim=(-0.4, len(ROAD) - 0.6), ylim=(-0.8, 0.6))
    axes.axis("off")
    for x, (name, by) in enumerate(ROAD):
        axes.add_patch(
            FancyBboxPatch((x - 0.33, 0), 0.66, 0.4, boxstyle="round,pad=0.03", facecolor="#eef2ff", edgecolor=BLUE)
        )
        axes.text(x, 0.2, name, ha="center", va="center", color=INK, fontsize=11)
        if by:
            axes.annotate("", (x + 0.64, 0.2), (x + 0.36, 0.2), arrowprops={"arrowstyle": "->", "color": INK})
            axes.text(x + 0.5, -0.45, by, ha="center", va="center", color=INK, fontsize=10)
    save(figure, target)


def draw_runs(folder: Path, target: Path) -> None:
    """The loss of a run whose worker is killed, upon that of the same run undisturbed."""
    run_job("synthesize.py", "--records", "4000", "--persona-answers", "0.9", "--seed", "1", "--output", folder / "raw")
    run_job("prepare.py", "--input", folder / "raw", "--output", folder / "data", "--valid", "0.02", "--test", "0.02")
    train(folder, "undisturbed")
    train(folder, "killed", kill_at=KILL_AT)
    undisturbed, killed = weights(folder / "undisturbed"), weights(folder / "killed")
    assert all(torch.equal(killed[name], value) for name, value in undisturbed.items()), "the runs differ"
    (calm,), (lost, went_on) = attempts(folder / "undisturbed"), attempts(folder / "killed")
    figure, axes = plt.subplots(figsize=(8, 3.2))
    axes.plot(*zip(*calm, strict=True), color=SOFT, linewidth=4, alpha=0.45, label="undisturbed")
    axes.plot(*zip(*lost, strict=True), color=RED, linewidth=1.2, label="killed: until kill -9 of a worker")
    axes.plot(*zip(*went_on, strict=True), color=BLUE, linewidth=1.2, label="killed: from the newest checkpoint on")
    axes.axvline(lost[-1][0], color=RED, linestyle=":")
    axes.axvline(went_on[0][0], color=BLUE, linestyle=":")
    axes.set(xlabel="examples", ylabel="training loss, nats")
    axes.set_title("A run with a killed worker ends with the same weights, bit for bit", color=INK, fontsize=11)
    axes.legend(edgecolor="none", framealpha=1)  # upon the dotted lines
    save(figure, target)


def train(folder: Path, name: str, kill_at: int | None = None) -> None:
    """A run of two workers; at the step ``kill_at`` one of them is killed."""
    command = [sys.executable, ROOT / "jobs/train.py", "arplus", "--tiny", "--data", folder / "data"]
    command += ["--storage", folder, "--run-name", name, "--workers", "2", "--max-steps", str(STEPS), "--epochs", "9"]
    command += ["--log-every", "1", "--checkpoint-every", str(EVERY), "--device", "cpu", "--seed", "1"]
    job = subprocess.Popen([str(part) for part in command], cwd=ROOT)
    try:
        while kill_at is not None and sum(map(len, attempts(folder / name))) < kill_at:
            assert job.poll() is None, "the run ended before its kill"
            time.sleep(0.05)
        if kill_at is not None:
            victim = next(p for p in psutil.Process(job.pid).children(recursive=True) if "TrainWorker" in p.name())
            victim.kill()
        assert job.wait(timeout=900) == 0, name
    finally:
        job.kill()


def attempts(run: Path) -> list[list[tuple[int, float]]]:
    """(examples trained on, loss) of each start of a run's workers, from its local record."""
    record, found = run / "tracking.jsonl", [[]]
    for line in record.read_text().splitlines(keepends=True) if record.exists() else []:
        event = json.loads(line) if line.endswith("\n") else {}
        if event.get("key") == "train/loss":
            if found[-1] and event["step"] <= found[-1][-1][0]:
                found.append([])
            found[-1].append((event["step"], event["value"]))
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of a run's newest checkpoint."""
    newest = max((run / "checkpoints").glob(f"step-{STEPS:08}*"))
    return safetensors.torch.load_file(newest / "weights.safetensors")


def run_job(name: str, *flags: object) -> None:
    """Runs a job to its end."""
    subprocess.run([sys.executable, ROOT / "jobs" / name, *map(str, flags)], cwd=ROOT, check=True)


def save(figure: plt.Figure, target: Path) -> None:
    """As SVG upon white, so that it reads on a dark page as well."""
    figure.savefig(target, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
