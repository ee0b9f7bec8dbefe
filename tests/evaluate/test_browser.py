"""The report of a real run in a real browser: nothing logged, nothing fetched, nothing wider than the window, prints."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (1280, 400)


class Browser:
    """Headless Chromium over its DevTools pipe: no driver, no package, no port."""

    def __init__(self, program: str, profile: Path):
        to_browser, self.writes = os.pipe()
        self.reads, from_browser = os.pipe()

        def wire() -> None:  # DevTools reads from descriptor 3 and writes to 4
            taken = [os.dup(end) for end in (to_browser, from_browser)]
            for end, place in zip(taken, (3, 4)):
                os.dup2(end, place)

        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=wire, close_fds=False,
        )  # fmt: skip
        os.close(to_browser), os.close(from_browser)
        self.events, self.number, self.buffer, self.session = [], 0, b"", None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.writes), os.close(self.reads)

    def read(self) -> dict:
        while b"\0" not in self.buffer:
            part = os.read(self.reads, 1 << 20)
            assert part, "the browser has gone"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def send(self, method: str, **given) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": given}
        os.write(
            self.writes, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0"
        )
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, width: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.events.clear()
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.read())

    def value(self, script: str):
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"]["value"]

    def picture(self, top: float, height: float, width: int) -> bytes:
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        found = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(found["data"])

    def pdf(self) -> bytes:
        return base64.b64decode(self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)["data"])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser on the path ({', '.join(NAMES)})")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def evaluated(store: Path, folder: Path, labels: list[str], **given) -> Path:
    """The folder that evaluate writes for a frozen probe on a store."""
    from carina.evaluate.score import evaluate
    from carina.finetune.run import finetune

    common = {"backbone": "random:resnet10t", "store": str(store), "scale": 64, "size": 64, "labels": labels}
    finetune("classify", {**common, "threads": 1, "wandb": "off", "out": str(folder)}, quiet=True)
    asked = {"store": str(store), "split": "val+test", "resamples": 200, "examples": 4, "pixels": True, **given}
    return Path(evaluate(str(folder), asked, quiet=True)["report"])


def check(browser: Browser, report: Path) -> None:
    for width in WIDTHS:
        browser.open(report, width)
        wide = browser.value("document.documentElement.scrollWidth")
        assert wide <= width, f"the page is {wide} wide in a window of {width}"
        cut = browser.value(
            "[...document.querySelectorAll('h1, h2, h3, p, li, dd, pre, figure')]"
            f".filter(e => e.getBoundingClientRect().right > {width} + 1 && !e.closest('.scroll')).map(e => e.textContent)"
        )
        assert not cut, cut
        logged = [
            e
            for e in browser.events
            if e["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        ]
        assert not logged, logged
        asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert asked[0] == report.resolve().as_uri() and all(url.startswith("data:") for url in asked[1:]), asked[1:]
    assert browser.value(
        "[...document.images].every(i => i.complete && i.naturalWidth > 0) && document.images.length > 0"
    )
    assert browser.value(
        "[...document.querySelectorAll('figure svg text')].some(t => t.textContent == 'false-positive rate')"
    )
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF") and 3 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 60
    assert report.stat().st_size < 10e6


def test_the_report_of_a_run_on_phantoms(browser, phantom_store, tmp_path):
    check(browser, evaluated(phantom_store, tmp_path / "run", ["Effusion", "Cardiomegaly"]))


@pytest.mark.slow
@pytest.mark.real
def test_the_report_of_a_run_on_radiographs(browser, real_data, tmp_path):
    import pandas as pd

    from carina.intake.prepare import prepare

    table = pd.read_csv(real_data / "nih_cxr14" / "labels.csv", dtype={"patient_id": str}).iloc[::4]
    table["path"] = [str(real_data / "nih_cxr14" / path) for path in table["path"]]
    table.to_csv(tmp_path / "rows.csv", index=False)
    labels = ["Effusion", "Infiltration", "abnormal"]
    columns = {
        "patient": "patient_id",
        "view": "view",
        "sex": "sex",
        "age": "age",
        "labels": ["Effusion", "Infiltration", "No_Finding"],
    }
    given = {"out": str(tmp_path / "store"), "scales": [64], "source": "nih", "workers": 1, **columns}
    prepare(str(tmp_path / "rows.csv"), given, quiet=True)
    check(browser, evaluated(tmp_path / "store", tmp_path / "run", labels, audits=["shortcut"]))
