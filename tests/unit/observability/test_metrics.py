"""The table of metrics, merging the texts of several nodes, and the dashboard."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from see_ray.observability.metrics import METRICS, merge_texts

ROOT = Path(__file__).parents[3]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text(encoding="utf-8"))
ONE = '# HELP ray_see_a_total about\n# TYPE ray_see_a_total counter\nray_see_a_total{n="1"} 1.0\n'
TWO = ONE.replace('"1"', '"2"') + '# TYPE ray_node_cpu gauge\nray_node_cpu{n="2"} 3.0\n'


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@pytest.mark.parametrize("name", METRICS)
def test_a_name_says_its_kind_and_unit(name: Any) -> None:
    kind = METRICS[name].kind
    assert re.fullmatch(r"see_[a-z_]+", name)
    assert name.endswith("_total") == (kind == "counter")
    assert bool(METRICS[name].boundaries) == (kind == "histogram")


def test_the_texts_of_several_nodes_make_one_that_prometheus_reads() -> None:
    (family,) = text_string_to_metric_families(merge_texts([ONE, TWO]))
    assert [sample.labels["n"] for sample in family.samples] == ["1", "2"]


def test_what_is_not_of_the_endpoint_is_left_out() -> None:
    assert "ray_node_cpu" not in merge_texts([TWO])


def test_a_node_without_an_answer_is_left_out() -> None:
    assert merge_texts(["", ONE]) == ONE


def test_a_metric_is_described_once() -> None:
    text = merge_texts([ONE, TWO])
    assert text.count("# HELP ray_see_a_total") == text.count("# TYPE ray_see_a_total") == 1


def test_histograms_keep_their_parts_together() -> None:
    parts = "".join(f"ray_see_h_{part} 1.0\n" for part in ('bucket{le="+Inf"}', "count", "sum"))
    text = "# HELP ray_see_h about\n# TYPE ray_see_h histogram\n" + parts
    (family,) = text_string_to_metric_families(merge_texts([text]))
    assert (family.type, len(family.samples)) == ("histogram", 3)


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for expression in expressions() for name in named(expression)}
    assert {name for name in METRICS if not any(found.startswith(f"ray_{name}") for found in shown)} == set()


def test_panels_do_not_cover_each_other() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [(p["x"] + x, p["y"] + y) for p in places for x in range(p["w"]) for y in range(p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_prometheus_takes_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"see:check{number}", "expr": expr} for number, expr in enumerate(expressions())]
    text = json.dumps({"groups": [{"name": "check", "rules": rules}]}).replace("$__rate_interval", "5m")
    (tmp_path / "rules.yaml").write_text(text, encoding="utf-8")
    done = subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
