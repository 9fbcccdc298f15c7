"""Pictures of a study's pages for the README: ``python tests/helpers/screenshots.py STUDY_FOLDER OUTPUT_FOLDER``.

STUDY_FOLDER is a finished study's, on local storage with MLflow's sqlite file beside it. Needs Chromium; starts an
MLflow server of its own on loopback and stops it.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image

CHROMIUM = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update", "--lang=en"),
]
SETTLE_MS = 20_000
"""Virtual milliseconds that a page has to load and draw."""


def main() -> None:
    """Takes the pictures."""
    study, output = (Path(argument).absolute() for argument in sys.argv[1:3])
    result = json.loads((study / "result.json").read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mlflow = Path(sys.executable).with_name("mlflow")
    database = f"sqlite:///{study.parent / 'mlflow.db'}"
    server = subprocess.Popen(
        [
            mlflow,
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
            "--backend-store-uri",
            database,
        ],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
    )
    try:
        _wait(f"http://127.0.0.1:{port}/health")
        output.mkdir(parents=True, exist_ok=True)
        pages = {"runs": result["runs_url"], "compare": result["compare_url"]}
        for name, url in pages.items():
            path = url.partition("/#/")[2]
            _picture(f"http://127.0.0.1:{port}/#/{path}", output / f"{name}.png", "1400,800")
            _shrink(output / f"{name}.png", width=1036)  # the rest is an offer of MLflow's to chat
        if (study / "report.html").exists():
            _picture((study / "report.html").as_uri(), output / "report.png", "1200,1290")
            _shrink(output / "report.png", width=1200)
    finally:
        server.terminate()
        server.wait(30)


def _wait(url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url):
                return
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{url}: no answer within two minutes")


def _picture(url: str, file: Path, size: str) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("Chromium is needed; on Debian: apt install chromium fonts-noto-cjk")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(chromium, *CHROMIUM, f"--user-data-dir={profile}", f"--window-size={size}"),
                *(f"--virtual-time-budget={SETTLE_MS}", f"--screenshot={file}", url),
            ],
            check=True,
            timeout=180,
        )


def _shrink(file: Path, width: int) -> None:
    """Cuts a picture to its first columns and keeps 128 colours, which are enough for text and lines."""
    with Image.open(file) as picture:
        small = picture.convert("RGB").crop((0, 0, width, picture.height)).quantize(128)
    small.save(file, optimize=True)


if __name__ == "__main__":
    main()
