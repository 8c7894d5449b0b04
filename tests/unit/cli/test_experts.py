"""`see experts` on a real store in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.conftest import See


def test_list_has_live_experts_in_the_order_asked_then_stored_ones(see: See, store: Any) -> None:
    code, out, _ = see("experts", "list", "--store", store.url)
    assert code == 0
    title, head, *rows = out.splitlines()
    assert title.startswith("sequence version 2")
    assert head.split()[:3] == ["expert", "state", "threshold"]
    assert [row.split()[:3] for row in rows] == [
        ["sa@1", "live", "0.6250"],
        ["qa@1", "live", "0.6250"],
        ["sa@2", "stored", "0.6250"],
    ]
    assert rows[1].endswith("  tasks/qa.jsonl")


def test_an_expert_that_was_set_aside_is_listed_with_its_reasons(
    see: See, store: Any, fields: Any, tmp_path: Path
) -> None:
    failed = {"gate": "set aside", "gate_failed": ("it would take 40 % of qa's 50 kept queries",)}
    store.save(tmp_path / "adapter", name="qa", task="tasks/qa.jsonl", **fields, **failed)
    rows = see("experts", "list", "--store", store.url)[1].splitlines()
    assert [row for row in rows if row.split()[:3] == ["qa@2", "set", "aside"]]
    shown = see("experts", "show", "qa@2", "--store", store.url)[1]
    assert "it would take 40 % of qa's 50 kept queries" in shown


def test_an_expert_that_was_forced_is_listed_as_such(see: See, store: Any, fields: Any, tmp_path: Path) -> None:
    forced = {"gate": "forced", "gate_failed": ("it is null",)}
    made = store.save(tmp_path / "adapter", name="pe", task="tasks/pe.jsonl", **fields, **forced)
    store.publish(made.ref, forced=True)
    rows = see("experts", "list", "--store", store.url)[1].splitlines()
    assert [row for row in rows if row.split()[:3] == ["pe@1", "live,", "forced"]]
    assert "(forced)" in see("experts", "history", "--store", store.url)[1]


def test_list_as_json(see: See, store: Any) -> None:
    body = json.loads(see("experts", "list", "--store", store.url, "--json")[1])
    assert body["sequence_version"] == 2
    assert [(e["name"], e["version"], e["live"]) for e in body["experts"]] == [
        ("sa", 1, True),
        ("qa", 1, True),
        ("sa", 2, False),
    ]


def test_an_empty_store_says_what_to_do(see: See, tmp_path: Path) -> None:
    code, out, _ = see("experts", "list", "--store", str(tmp_path / "new"))
    assert code == 0
    assert "see learn" in out
    assert see("experts", "history", "--store", str(tmp_path / "new"))[1] == "nothing published yet\n"


def test_show_has_the_manifest(see: See, store: Any) -> None:
    out = see("experts", "show", "sa", "--store", store.url)[1]
    assert out.startswith("sa@1\n")
    assert "live in sequence version 2, place 1 of 2" in out
    assert "accept 17, pass 18" in out
    assert "own_accepted      0.98" in out
    assert "stored, not live" in see("experts", "show", "sa@2", "--store", store.url)[1]
    body = json.loads(see("experts", "show", "sa@2", "--store", store.url, "--json")[1])
    assert (body["version"], body["live"], body["r"]) == (2, False, 16)


def test_show_of_an_unknown_expert_names_those_there_are(see: See, store: Any) -> None:
    code, _, err = see("experts", "show", "pe", "--store", store.url)
    assert code == 1
    assert "it has: qa@1, sa@1, sa@2" in err


def test_remove_roll_back_and_history(see: See, store: Any) -> None:
    where = ["--store", store.url]
    assert see("experts", "remove", "qa", *where)[1] == "sequence version 3: remove qa@1; live: sa@1\n"
    assert see("experts", "rollback", "2", *where)[1] == "sequence version 4: roll back to 2; live: sa@1, qa@1\n"
    assert "live: none" in see("experts", "rollback", "0", *where)[1]
    rows = see("experts", "history", *where)[1].splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert "remove qa@1" in rows[2]
    versions = json.loads(see("experts", "history", *where, "--json")[1])
    assert [len(version["experts"]) for version in versions] == [1, 2, 1, 2, 0]


def test_remove_of_what_is_not_live_fails(see: See, store: Any) -> None:
    code, _, err = see("experts", "remove", "pe", "--store", store.url)
    assert (code, err) == (1, "error: no live expert is called pe; live are: qa, sa\n")
