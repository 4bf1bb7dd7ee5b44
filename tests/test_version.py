"""One number, `client/topfive/_version.py`: whoever tells a version tells this one."""

import importlib.metadata
import re
from pathlib import Path

import pytest
from tests.server.fakes import FakeEngine, make_info
from tests.server.harness import serving

from topfive import __version__
from topfive.cli import main

ROOT = Path(__file__).parents[1]


def test_the_command_and_the_package_tell_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert importlib.metadata.version("topfive") == __version__


def test_the_server_tells_it() -> None:
    with serving(FakeEngine(make_info())) as server:
        assert server.request("GET", "/healthz").json["version"] == __version__
        assert server.request("GET", "/v2").json["version"] == __version__
        assert server.request("GET", "/openapi.json").json["info"]["version"] == __version__
        assert f'version="{__version__}"' in server.request("GET", "/metrics").body.decode()


def test_the_changelog_begins_with_it() -> None:
    headings = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == __version__


def test_the_image_to_deploy_is_tagged_with_it() -> None:
    manifest = (ROOT / "deploy" / "kubernetes.yaml").read_text("utf-8")
    assert re.findall(r"image: topfive:(\S+)", manifest) == [__version__]
