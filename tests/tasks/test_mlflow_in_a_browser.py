"""Two runs of a project compared in MLflow's own page, in Debian's Chromium: what differs, and both curves in one chart."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.launch.program import reproduce
from tasks.launch.workspace import open_workspace
from tasks.project import Project
from tests.ports import free_port
from tests.waiting import wait_for

pytestmark = pytest.mark.browser
CHROMIUM = Path("/usr/bin/chromium")
PATIENCE = 300_000  # milliseconds that a busy machine may take for one wait


@pytest.fixture
def page_of_two_runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("LLADAFLOW_TRACKING")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    spec = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(spec[: spec.index("  evaluate:")])
    reproduce(open_workspace(Project.at(project)), [])
    reproduce(open_workspace(Project.at(project), overrides=["pretrain.learning_rate=0.25"]), [])
    port = free_port()
    store = ["--backend-store-uri", f"sqlite:///{project}/mlflow.db", "--workers", "1", "--port", str(port)]
    quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *store], env=quiet, start_new_session=True)
    try:
        wait_for("MLflow", lambda: _answers(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def _answers(port: int) -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200)
    except OSError:
        return False


def test_two_ticked_runs_show_what_differs_and_both_curves(page_of_two_runs: str) -> None:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing; install it: apt-get install -y chromium")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is missing; pip install playwright")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"], timeout=PATIENCE)
        tab = browser.new_page(viewport={"width": 1500, "height": 1000})
        tab.set_default_timeout(PATIENCE)
        tab.goto(f"{page_of_two_runs}/#/experiments/1/runs")
        names = ("toy", "toy pretrain.learning_rate=0.25")
        for name in names:
            row = tab.get_by_role("row").filter(has=tab.get_by_text(name, exact=True)).first
            row.wait_for()
            tab.locator(f'[row-id="{row.get_attribute("row-id")}"] input[type=checkbox]').first.check(force=True)
        tab.get_by_role("button", name="Compare", exact=True).click()
        tab.get_by_text("Run details").wait_for()
        tab.get_by_text("Show diff only").first.click()
        differing = tab.get_by_role("row").filter(has=tab.get_by_text("pretrain.learning_rate", exact=True))
        differing.first.wait_for()
        assert all(value in differing.first.inner_text() for value in ("0.5", "0.25"))
        tab.get_by_text("pretrain.max_steps", exact=True).wait_for(state="hidden")  # the same in both
        tab.get_by_role("link", name="pretrain/loss", exact=True).first.click()
        for name in names:  # in the table below the chart: where each curve ended
            ended = tab.get_by_role("row").filter(has=tab.get_by_text(name, exact=True)).filter(has_text="(step=4)")
            ended.first.wait_for()
        curves = tab.locator(".scatterlayer .trace .js-line")
        curves.nth(1).wait_for(state="attached")
        drawn = [curve.get_attribute("d") or "" for curve in curves.all()]
        assert len([line for line in drawn if len(line.split("L")) == 4 or "C" in line]) >= 2, drawn
        browser.close()
