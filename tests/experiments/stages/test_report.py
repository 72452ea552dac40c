"""The page of a run: whole, readable without a network, and honest about what was not run."""

import base64
import re
import shutil
from html.parser import HTMLParser

from tests.experiments.conftest import run


class Page(HTMLParser):
    """Collects the tags, and checks that what is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_report_holds_all_that_it_shows(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    done = run(workdir, mode="report")
    assert done.returncode == 0, done.stderr
    text = (workdir / "report.html").read_text()
    page = Page(text)
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 4  # best, worst, learning curve, latent map
    for picture in pictures:
        kind, data = picture.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data)[:4] == b"\x89PNG"
    assert not re.search(r"""(src|href)=["']?(http|//)|url\(|@import|<script""", text)
    words = " ".join(page.words)
    for stage in ("curves", "classify"):  # not run here, and said so
        assert f"--mode={stage}" in words
    assert "latent_dim" in words
    assert "PSNR, dB, test mean" in words
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [a for _, a in page.tags]


def test_a_report_needs_an_evaluation(tmp_path):
    done = run(tmp_path / "new", mode="report")
    assert done.returncode == 1
    assert re.search(r"error: .*no evaluation.json to report on; run --mode=evaluate first\n$", done.stderr)
