"""The dashboard and the alerts name metrics that the server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.command_server import CommandServer
from tests.conftest import ROOT
from tests.serving.http.conftest import Server, wait_until
from tests.serving.http.test_proxies import free_port

DOCKER = ROOT / "docker"
ALERTS = DOCKER / "prometheus" / "alerts.yaml"
DASHBOARD: dict[str, Any] = json.loads((DOCKER / "grafana" / "robustfeat.json").read_text("utf-8"))
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text("utf-8"))["groups"][0]["rules"]


@pytest.fixture(scope="module")
def watched(
    commands: CommandServer, clothes: Path, photos: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with a key and a head that has answered, refused and failed."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("team 5tUgR0-a-key-of-the-tests\n")
    started = Server("--keys", keys, "--head", f"clothes={clothes}", forked_from=commands)
    started.headers = {"Authorization": "Bearer 5tUgR0-a-key-of-the-tests"}
    ask_all(started, photos)
    yield started
    assert started.stop() == 0


def ask_all(server: Server, photos: list[bytes]) -> None:
    server.form("/embed", [photos[0], b"no image"])
    server.post("/predict/clothes", photos[0])


@pytest.fixture(scope="module")
def exported(watched: Server) -> dict[str, set[str]]:
    """The labels of each series at /metrics."""
    # Answers are counted ten times a second, and memory is measured more rarely.
    wait_until(lambda: bool(watched.metric("robustfeat_errors_total") and watched.metric("robustfeat_memory_bytes")))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(watched.get("/metrics").body.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in RULES)])
def test_every_query_names_metrics_and_labels_that_exist(query: str, exported: dict[str, set[str]]) -> None:
    of_prometheus = {"instance", "job"}
    used = re.findall(r"\b(robustfeat_\w+|up)\b(?:\{([^}]*)\})?", query)
    assert used
    for name, selectors in used:
        if name != "up":
            assert name in exported
            labels = set(re.findall(r"(\w+)\s*[=!]", selectors))
            assert labels <= exported[name] | of_prometheus, name
    names = {name for name, _ in used if name != "up"}
    grouped = set(re.findall(r"\w+", " ".join(re.findall(r"\bby \(([^)]*)\)", query))))
    for name in names:
        assert grouped <= exported[name] | of_prometheus, name


def test_the_panels_are_distinct_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        cells = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        assert columns.stop <= 24  # Grafana's columns
        taken |= cells
    source = yaml.safe_load((DOCKER / "grafana" / "datasource.yaml").read_text("utf-8"))["datasources"][0]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}


def promtool(*arguments: object) -> str:
    if shutil.which("promtool") is None:
        pytest.skip("Prometheus is not installed")
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_prometheus_takes_the_configuration_and_the_rules() -> None:
    promtool("check", "config", DOCKER / "prometheus" / "prometheus.yaml")
    assert f"{len(RULES)} rules found" in promtool("check", "rules", ALERTS)


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    cases = Path(__file__).with_name("alert_cases.yaml")
    tests = yaml.safe_load(cases.read_text("utf-8"))["tests"]
    expected = [rule for case in tests for rule in case["alert_rule_test"] if rule.get("exp_alerts")]
    assert {rule["alertname"] for rule in expected} == {rule["alert"] for rule in RULES}
    promtool("test", "rules", cases)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_answers_every_query_of_the_dashboard(watched: Server, photos: list[bytes], tmp_path: Path) -> None:
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "robustfeat", "static_configs": [{"targets": [f"127.0.0.1:{watched.port}"]}]}],
    }
    (tmp_path / "prometheus.yaml").write_text(json.dumps(config))
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 15
        while time.monotonic() < end:  # so that there are rates
            ask_all(watched, photos)
            time.sleep(0.2)
        for query in QUERIES:
            asked = query.replace("$instance", ".*").replace("$__rate_interval", "10s")
            place = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(asked)}"
            with urllib.request.urlopen(place) as answer:
                result = json.loads(answer.read())["data"]["result"]
            assert result, query
            assert all(series["value"][1] != "NaN" for series in result), query
    finally:
        process.terminate()
        process.wait(30)
