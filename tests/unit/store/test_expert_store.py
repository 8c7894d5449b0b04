"""The expert store: real files, real processes, real races."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import threading
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from obstore.store import MemoryStore
from pydantic import ValidationError

from see_ray.errors import ConflictError, FingerprintError, NotFoundError, SeeError, StoreError
from see_ray.store import expert_store as store_module
from see_ray.store import sequence_log
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence, Manifest

FIELDS = {
    "task": "sentiment",
    "base_model": "embedded",
    "fingerprint": "f00d",
    "form": "activated",
    "activation_tokens": 1,
    "generation_prompt": (1, 2, 3),
    "indicator_tokens": (17, 18),
    "threshold": 0.5,
    "metrics": {"rouge_l": 0.1 + 0.2},
    "r": 16,
}


def adapter(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / "adapter_model.safetensors").write_text(text)
    (folder / "rehearsal.jsonl").write_text('{"prompt": "é"}\n', encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return adapter(tmp_path / "adapter")


@pytest.fixture
def store(tmp_path: Path) -> ExpertStore:
    return ExpertStore.open(tmp_path / "store")


def save(store: ExpertStore, folder: Path, name: str = "sa", **fields: Any) -> ExpertRef:
    return store.save(folder, name=name, **(FIELDS | fields)).ref


def live(sequence: ExpertSequence) -> list[str]:
    return [expert.id for expert in sequence.experts]


# Saving and finding


def test_an_empty_store_has_sequence_0(store: ExpertStore) -> None:
    assert store.head().version == 0
    assert store.head().experts == store.head().newest_first() == ()
    assert store.history() == []
    assert store.experts() == []


def test_a_saved_expert_reads_back_and_is_not_live(store: ExpertStore, folder: Path) -> None:
    manifest = store.save(folder, name="sa", **FIELDS)
    assert manifest.id == "sa@1"
    assert store.manifest(manifest.ref) == manifest
    assert [found.id for found in store.experts()] == ["sa@1"]
    assert sorted(manifest.files) == ["adapter_config.json", "adapter_model.safetensors", "rehearsal.jsonl"]
    assert store.head().version == 0


def test_each_save_of_a_name_is_the_next_version(store: ExpertStore, folder: Path) -> None:
    assert [save(store, folder).id for _ in range(3)] == ["sa@1", "sa@2", "sa@3"]


def test_a_claimed_number_is_never_used_again(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "store/experts/sa/1").mkdir(parents=True)
    (tmp_path / "store/experts/sa/1/claim").write_text("somebody else's")
    assert save(store, folder).id == "sa@2"


def test_saving_a_second_version_leaves_the_first_as_it_was(store: ExpertStore, tmp_path: Path) -> None:
    first = save(store, adapter(tmp_path / "a", "one"))
    save(store, adapter(tmp_path / "b", "two"))
    assert store.read_text(first, "adapter_model.safetensors") == "one"


def test_subfolders_are_kept(store: ExpertStore, folder: Path) -> None:
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.txt").write_text("a")
    assert store.read_text(save(store, folder), "tokenizer/vocab.txt") == "a"


def test_resolve_prefers_the_live_version_and_else_takes_the_newest(store: ExpertStore, folder: Path) -> None:
    first, second = save(store, folder), save(store, folder)
    assert store.resolve("sa") == second
    store.publish(first)
    assert store.resolve("sa") == first
    assert store.resolve("sa@2") == second


@pytest.mark.parametrize("text", ["qa", "sa@7", "sa@0", "../sa", "SA", "", "sa@"])
def test_resolving_what_is_not_there_is_not_found(store: ExpertStore, folder: Path, text: str) -> None:
    save(store, folder)
    with pytest.raises(NotFoundError, match="sa"):
        store.resolve(text)


@pytest.mark.parametrize("name", ["", "Sa", "a/b", "..", "-a", "a" * 64, "a\n"])
def test_a_bad_name_is_refused_before_anything_is_written(
    store: ExpertStore, folder: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(StoreError, match="name"):
        save(store, folder, name)
    assert not list((tmp_path / "store").rglob("*"))


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": 1.5},
        {"metrics": {"score": float("nan")}},
        {"form": "full"},
        {"activation_tokens": None},
        {"activation_tokens": 4},
        {"r": 0},
        {"surprise": 1},
    ],
)
def test_a_field_out_of_bounds_is_a_store_error(store: ExpertStore, folder: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="cannot save sa"):
        save(store, folder, **fields)


def test_an_empty_folder_is_refused(store: ExpertStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no files"):
        save(store, tmp_path / "nothing")


def test_a_folder_with_the_stores_own_files_is_refused(store: ExpertStore, folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match=r"without claim and manifest.json"):
        save(store, folder)


def test_records_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        ExpertRef(name="sa", version=1).version = 2  # type: ignore[misc]


# Publishing


def test_publishing_appends_at_the_newest_end(store: ExpertStore, folder: Path) -> None:
    for name in ("qa", "sa", "pe"):
        sequence = store.publish(save(store, folder, name))
    assert live(sequence) == ["qa@1", "sa@1", "pe@1"]
    assert [expert.id for expert in sequence.newest_first()] == ["pe@1", "sa@1", "qa@1"]
    assert store.head() == sequence
    assert (sequence.version, sequence.change) == (3, "publish pe@1")


def test_another_store_object_sees_a_publish_at_once(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    reader = ExpertStore.open(tmp_path / "store")
    for version, name in enumerate(["qa", "sa"], start=1):
        store.publish(save(store, folder, name))
        assert reader.head().version == version


def test_the_same_name_twice_is_a_conflict(store: ExpertStore, folder: Path) -> None:
    store.publish(save(store, folder))
    with pytest.raises(ConflictError, match="sa@1 is live"):
        store.publish(save(store, folder))
    assert live(store.head()) == ["sa@1"]


def test_replacing_moves_the_name_to_the_newest_end(store: ExpertStore, folder: Path) -> None:
    for name in ("sa", "qa"):
        store.publish(save(store, folder, name))
    assert live(store.publish(save(store, folder), replace=True)) == ["qa@1", "sa@2"]
    assert store.head().change == "publish sa@2 in place of sa@1"


def test_publishing_what_is_live_already_is_a_conflict(store: ExpertStore, folder: Path) -> None:
    ref = save(store, folder)
    store.publish(ref)
    with pytest.raises(ConflictError):
        store.publish(ref, replace=True)


def test_another_base_model_is_refused(store: ExpertStore, folder: Path) -> None:
    store.publish(save(store, folder))
    with pytest.raises(FingerprintError, match=r"beef.*f00d"):
        store.publish(save(store, folder, "qa", fingerprint="beef"))
    assert live(store.head()) == ["sa@1"]


def test_the_only_expert_may_be_replaced_by_one_of_another_base_model(store: ExpertStore, folder: Path) -> None:
    store.publish(save(store, folder))
    assert live(store.publish(save(store, folder, fingerprint="beef"), replace=True)) == ["sa@2"]


def test_an_unknown_expert_cannot_be_published(store: ExpertStore) -> None:
    with pytest.raises(NotFoundError, match="sa@1"):
        store.publish(ExpertRef(name="sa", version=1))


def test_a_check_that_refuses_leaves_the_head_as_it_was(store: ExpertStore, folder: Path) -> None:
    def refuse(head: ExpertSequence) -> None:
        raise ConflictError("no better than the generalist")

    with pytest.raises(ConflictError, match="generalist"):
        store.publish(save(store, folder), check=refuse)
    assert store.head().version == 0


def test_forced_is_recorded(store: ExpertStore, folder: Path) -> None:
    store.publish(save(store, folder), forced=True)
    store.publish(save(store, folder, "qa"))
    assert [sequence.forced for sequence in store.history()] == [True, False]


def test_a_lost_race_runs_the_check_again_on_the_new_head(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    rival, theirs, seen = ExpertStore.open(tmp_path / "store"), save(store, folder, "qa"), []

    def check(head: ExpertSequence) -> None:
        seen.append(live(head))
        if len(seen) == 1:
            rival.publish(theirs)

    sequence = store.publish(save(store, folder), check=check)
    assert seen == [[], ["qa@1"]]
    assert live(sequence) == ["qa@1", "sa@1"]


def test_a_check_that_refuses_the_new_head_leaves_the_rivals_publish_alone(
    store: ExpertStore, folder: Path, tmp_path: Path
) -> None:
    rival, theirs = ExpertStore.open(tmp_path / "store"), save(store, folder, "qa")

    def check(head: ExpertSequence) -> None:
        if head.experts:
            raise ConflictError("would take queries from qa")
        rival.publish(theirs)

    with pytest.raises(ConflictError, match="would take"):
        store.publish(save(store, folder), check=check)
    assert live(store.head()) == ["qa@1"]


def test_a_lost_race_notices_that_the_name_is_now_taken(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    rival, first, second = ExpertStore.open(tmp_path / "store"), save(store, folder), save(store, folder)

    def race(head: ExpertSequence) -> None:
        if not head.experts:
            rival.publish(first)

    with pytest.raises(ConflictError, match="sa@1 is live"):
        store.publish(second, check=race)
    assert live(store.head()) == ["sa@1"]


def test_losing_every_race_ends_in_a_conflict(
    store: ExpertStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_log, "_TRIES", 3)
    rival = ExpertStore.open(tmp_path / "store")
    theirs = iter([save(store, folder, f"rival{i}") for i in range(4)])

    def race(head: ExpertSequence) -> None:
        rival.publish(next(theirs))

    with pytest.raises(ConflictError, match="3 times"):
        store.publish(save(store, folder), check=race)
    assert store.head().version == 3


def publish_ten(url: str, folder: Path, prefix: str) -> None:
    store = ExpertStore.open(url)
    for i in range(10):
        store.publish(save(store, folder, f"{prefix}{i}"))


def test_two_processes_that_publish_at_once_lose_nothing(store: ExpertStore, folder: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=publish_ten, args=(store.url, folder, prefix)) for prefix in "ab"]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):  # a reader at the same time never meets a gap
        store.head()
    assert [worker.exitcode for worker in workers] == [0, 0]

    history = store.history()
    assert [sequence.version for sequence in history] == list(range(1, 21))
    for before, after in pairwise(history):
        assert after.experts[:-1] == before.experts
        assert after.created_at >= before.created_at
    assert sorted(live(history[-1])) == sorted(f"{prefix}{i}@1" for prefix in "ab" for i in range(10))


def test_saving_one_name_from_many_threads_gives_each_its_own_version(store: ExpertStore, folder: Path) -> None:
    threads = [threading.Thread(target=save, args=(store, folder)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(manifest.version for manifest in store.experts()) == list(range(1, 9))


# The log


def test_removing_takes_out_one_expert_and_keeps_its_files(store: ExpertStore, folder: Path) -> None:
    for name in ("qa", "sa", "pe"):
        store.publish(save(store, folder, name))
    sequence = store.remove("sa")
    assert (live(sequence), sequence.change) == (["qa@1", "pe@1"], "remove sa@1")
    assert store.resolve("sa").id == "sa@1"


def test_removing_what_is_not_live_names_what_is(store: ExpertStore, folder: Path) -> None:
    store.publish(save(store, folder))
    with pytest.raises(NotFoundError, match="live are: sa"):
        store.remove("qa")


def test_rolling_back_is_a_new_version_with_the_old_list(store: ExpertStore, folder: Path) -> None:
    for name in ("qa", "sa", "pe"):
        store.publish(save(store, folder, name))
    sequence = store.roll_back(2)
    assert (sequence.version, live(sequence), sequence.change) == (4, ["qa@1", "sa@1"], "roll back to 2")
    assert live(store.sequence(3)) == ["qa@1", "sa@1", "pe@1"]
    assert live(store.roll_back(0)) == []


def test_rolling_back_to_what_is_live_is_a_conflict(store: ExpertStore, folder: Path) -> None:
    store.publish(save(store, folder))
    with pytest.raises(ConflictError, match="now live"):
        store.roll_back(1)


def test_rolling_back_to_an_expert_that_is_gone_is_a_conflict(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    store.publish(save(store, folder))
    store.remove("sa")
    (tmp_path / "store/experts/sa/1/manifest.json").unlink()
    with pytest.raises(ConflictError, match="cannot roll back to 1: expert sa@1"):
        store.roll_back(1)


@pytest.mark.parametrize("version", [-1, 5])
def test_a_version_that_never_was_is_not_found(store: ExpertStore, folder: Path, version: int) -> None:
    store.publish(save(store, folder))
    with pytest.raises(NotFoundError, match="the newest is 1"):
        store.sequence(version)


def test_at_answers_what_was_live_at_any_time(store: ExpertStore, folder: Path) -> None:
    versions = [store.publish(save(store, folder, name)) for name in ("qa", "sa", "pe", "trans", "para")]
    tick = timedelta(microseconds=1)
    assert store.at(versions[0].created_at - tick).version == 0
    for sequence in versions:
        assert store.at(sequence.created_at) == sequence
    for before, after in pairwise(versions):
        assert store.at(after.created_at - tick) == before
    assert store.at(datetime.now(UTC)) == versions[-1]


def test_at_needs_a_time_zone(store: ExpertStore) -> None:
    with pytest.raises(StoreError, match="time zone"):
        store.at(datetime(2026, 1, 1))


def test_the_log_never_goes_back_in_time(store: ExpertStore, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LateClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2001, 1, 1, tzinfo=tz)

    first = store.publish(save(store, folder))
    monkeypatch.setattr(sequence_log, "datetime", LateClock)
    assert store.publish(save(store, folder, "qa")).created_at == first.created_at


def test_head_looks_only_at_the_end_of_a_long_log(
    store: ExpertStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("qa", "sa", "pe"):
        store.publish(save(store, folder, name))
    store.head()
    listed: list[list[str]] = []
    real = store._objects.list

    def noted(*args: Any, **options: Any) -> list[str]:
        listed.append(real(*args, **options))
        return listed[-1]

    monkeypatch.setattr(store._objects, "list", noted)
    assert store.head().version == 3
    assert listed == [["sequence/00000003.json"]]


def test_foreign_files_beside_the_snapshots_are_ignored(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    store.publish(save(store, folder))
    for name in (".DS_Store", "00000009.json.bak", "9.json"):
        (tmp_path / "store/sequence" / name).write_text("?")
    assert store.head().version == 1


# What goes wrong


def publish_and_die(url: str, folder: Path) -> None:
    store = ExpertStore.open(url)
    real = store._objects.create

    def create(path: str, data: bytes) -> bool:
        return os._exit(9) if path.endswith("manifest.json") else real(path, data)

    store._objects.create = create  # type: ignore[method-assign]
    save(store, folder)


def test_a_crash_before_the_manifest_leaves_nothing_to_see(store: ExpertStore, folder: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=publish_and_die, args=(store.url, folder))
    worker.start()
    worker.join()
    assert worker.exitcode == 9
    assert store.experts() == []
    with pytest.raises(NotFoundError, match="incomplete"):
        store.publish(ExpertRef(name="sa", version=1))
    with pytest.raises(NotFoundError):
        store.resolve("sa")
    assert save(store, folder).id == "sa@2"


def damage(path: Path, how: str) -> None:
    text = path.read_text()
    body = json.loads(text)
    if how == "half written":
        path.write_text(text[: len(text) // 2])
    elif how == "empty":
        path.write_text("")
    elif how == "not an object":
        path.write_text("[]")
    elif how == "edited":
        path.write_text(json.dumps(body | {"created_at": "2020-01-01T00:00:00Z"}))
    elif how == "seal removed":
        del body["sha256"]
        path.write_text(json.dumps(body))


DAMAGE = ["half written", "empty", "not an object", "edited", "seal removed"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_corrupt_snapshot_is_named(store: ExpertStore, folder: Path, tmp_path: Path, how: Any) -> None:
    for name in ("sa", "qa"):
        store.publish(save(store, folder, name))
    damage(tmp_path / "store/sequence/00000002.json", how)
    for read in (store.head, store.history, lambda: store.remove("sa"), ExpertStore.open(store.url).head):
        with pytest.raises(StoreError, match=r"sequence/00000002.json is corrupt"):
            read()
    assert store.sequence(1).version == 1


@pytest.mark.parametrize("how", DAMAGE)
def test_a_corrupt_manifest_is_named(store: ExpertStore, folder: Path, tmp_path: Path, how: Any) -> None:
    ref = save(store, folder)
    damage(tmp_path / "store/experts/sa/1/manifest.json", how)
    for read in (store.experts, lambda: store.publish(ref), lambda: store.fetch(ref, tmp_path / "cache")):
        with pytest.raises(StoreError, match=r"experts/sa/1/manifest.json is corrupt"):
            read()


def test_a_snapshot_copied_to_another_number_is_corrupt(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    store.publish(save(store, folder))
    log = tmp_path / "store/sequence"
    (log / "00000002.json").write_bytes((log / "00000001.json").read_bytes())
    with pytest.raises(StoreError, match=r"00000002.json is corrupt"):
        store.head()


def test_a_later_format_asks_for_an_upgrade(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    ref = save(store, folder)
    path = tmp_path / "store/experts/sa/1/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(StoreError, match="upgrade see_ray"):
        store.manifest(ref)


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_gap_in_the_log_is_named(store: ExpertStore, folder: Path, tmp_path: Path, missing: int) -> None:
    for name in ("qa", "sa", "pe"):
        store.publish(save(store, folder, name))
    store.head()
    (tmp_path / f"store/sequence/0000000{missing}.json").unlink()
    fresh = ExpertStore.open(store.url)
    if missing < 3:  # without the newest, a store that never saw it has no way to know
        with pytest.raises(StoreError, match=f"0000000{missing}.json is missing"):
            fresh.head()
    else:
        with pytest.raises(StoreError, match=r"00000003.json is missing"):
            store.head()


def test_a_listing_that_skips_a_version_is_no_gap(
    store: ExpertStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("qa", "sa", "pe"):
        store.publish(save(store, folder, name))
    real = store._objects.list
    monkeypatch.setattr(
        store._objects, "list", lambda *args, **kw: [p for p in real(*args, **kw) if "00000002" not in p]
    )
    assert store.head().version == 3


def test_a_manifest_cannot_name_files_outside_the_folder() -> None:
    fields = FIELDS | {"name": "sa", "version": 1, "created_at": datetime.now(UTC)}
    Manifest(**fields, files={"a/.b/c-1.json": "0" * 64})
    for name in ("../x", "/etc/passwd", "a/../../x", "a//b", "..", ".", "", "a\\b", "a#1", "a\n"):
        with pytest.raises(ValidationError, match="files"):
            Manifest(**fields, files={name: "0" * 64})


@pytest.mark.parametrize("url", ["http://example.com/x", "memory:///", "ftp://host/x", "s3://", "nonsense://x"])
def test_a_url_that_cannot_be_a_store_is_a_store_error(url: str) -> None:
    with pytest.raises(StoreError, match="cannot open the expert store"):
        ExpertStore.open(url)


def test_a_store_that_is_a_file_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot open the expert store .*check that the folder"):
        ExpertStore.open(tmp_path / "file")


def test_a_missing_azure_account_says_which_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(StoreError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        ExpertStore.open("az://container/experts")


def test_a_file_url_is_the_folder(tmp_path: Path, folder: Path) -> None:
    store = ExpertStore.open((tmp_path / "a store").as_uri())
    save(store, folder)
    assert ExpertStore.open(tmp_path / "a store").resolve("sa").id == "sa@1"


def test_errors_survive_pickling(store: ExpertStore) -> None:
    with pytest.raises(SeeError) as raised:
        store.resolve("sa")
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


# Fetching


@pytest.fixture
def bucket() -> ExpertStore:
    return ExpertStore(MemoryStore(), "memory")


def test_a_local_store_hands_out_its_own_folder(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    fetched = store.fetch(save(store, folder), tmp_path / "cache")
    assert fetched == (tmp_path / "store/experts/sa/1").resolve()
    assert not (tmp_path / "cache").exists()


def test_a_bucket_is_downloaded_once(bucket: ExpertStore, folder: Path, tmp_path: Path) -> None:
    (folder / "large.bin").write_bytes(os.urandom(11_000_000))  # more than one part of a multipart upload
    ref = save(bucket, folder)
    fetched = bucket.fetch(ref, tmp_path / "cache")
    for path in folder.iterdir():
        assert (fetched / path.name).read_bytes() == path.read_bytes()
    bucket._objects._store.put("experts/sa/1/large.bin", b"a second download would meet this")
    assert bucket.fetch(ref, tmp_path / "cache") == fetched
    assert os.listdir(tmp_path / "cache") == [fetched.name]


def test_two_stores_share_a_cache_without_mixing(tmp_path: Path) -> None:
    for text in ("one", "two"):
        bucket = ExpertStore(MemoryStore())
        ref = save(bucket, adapter(tmp_path / text, text))
        assert (bucket.fetch(ref, tmp_path / "cache") / "adapter_model.safetensors").read_text() == text


def test_many_at_once_download_into_one_folder(bucket: ExpertStore, folder: Path, tmp_path: Path) -> None:
    ref, found = save(bucket, folder), []
    barrier = threading.Barrier(8)

    def fetch() -> None:
        barrier.wait()
        found.append(bucket.fetch(ref, tmp_path / "cache"))

    threads = [threading.Thread(target=fetch) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert os.listdir(tmp_path / "cache") == [found[0].name]


def test_a_download_that_ends_second_takes_the_first(
    bucket: ExpertStore, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref, first, real = save(bucket, folder), [], store_module._verify

    def overtaken(where: Path, manifest: Manifest, name: str) -> None:
        monkeypatch.setattr(store_module, "_verify", real)
        first.append(bucket.fetch(ref, tmp_path / "cache"))
        real(where, manifest, name)

    monkeypatch.setattr(store_module, "_verify", overtaken)
    assert [bucket.fetch(ref, tmp_path / "cache")] == first
    assert os.listdir(tmp_path / "cache") == [first[0].name]


def test_a_cache_that_cannot_be_written_is_a_store_error(bucket: ExpertStore, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(StoreError, match="cannot fetch sa@1"):
        bucket.fetch(save(bucket, folder), tmp_path / "cache")


def test_the_log_works_in_a_bucket(bucket: ExpertStore, folder: Path) -> None:
    for name in ("qa", "sa", "pe"):
        bucket.publish(save(bucket, folder, name))
    bucket.remove("sa")
    assert [live(sequence) for sequence in bucket.history()][-1] == live(bucket.head()) == ["qa@1", "pe@1"]


def test_a_corrupt_file_is_named(store: ExpertStore, folder: Path, tmp_path: Path) -> None:
    ref = save(store, folder)
    (tmp_path / "store/experts/sa/1/adapter_model.safetensors").write_text("weighty")
    with pytest.raises(StoreError, match=r"adapter_model.safetensors is corrupt"):
        store.fetch(ref, tmp_path / "cache")
    with pytest.raises(StoreError, match=r"adapter_model.safetensors is corrupt"):
        store.read_bytes(ref, "adapter_model.safetensors")


def test_a_corrupt_file_in_a_bucket_does_not_enter_the_cache(bucket: ExpertStore, folder: Path, tmp_path: Path) -> None:
    ref = save(bucket, folder)
    bucket._objects._store.put("experts/sa/1/adapter_model.safetensors", b"weighty")
    with pytest.raises(StoreError, match=r"experts/sa/1/adapter_model.safetensors is corrupt"):
        bucket.fetch(ref, tmp_path / "cache")
    assert os.listdir(tmp_path / "cache") == []


@pytest.mark.parametrize("where", ["store", "bucket"])
def test_a_missing_file_is_named(where: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(where)
    ref = save(store, folder)
    store._objects._store.delete("experts/sa/1/rehearsal.jsonl")
    with pytest.raises(StoreError, match=r"rehearsal.jsonl"):
        store.fetch(ref, tmp_path / "cache")


def test_a_cache_that_is_damaged_later_is_noticed(bucket: ExpertStore, folder: Path, tmp_path: Path) -> None:
    ref = save(bucket, folder)
    (bucket.fetch(ref, tmp_path / "cache") / "adapter_config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"adapter_config.json is corrupt"):
        bucket.fetch(ref, tmp_path / "cache")


def test_reading_a_file(store: ExpertStore, folder: Path) -> None:
    ref = save(store, folder)
    assert store.read_text(ref, "rehearsal.jsonl") == '{"prompt": "é"}\n'
    assert store.read_bytes(ref, "adapter_model.safetensors") == b"weights"
    with pytest.raises(NotFoundError, match=r"no file x; it has adapter_config.json"):
        store.read_bytes(ref, "x")
