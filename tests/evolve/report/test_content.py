"""What a report computes, by exact numbers; nothing is drawn."""

import dataclasses
import json

import pytest

from evolve.journal import Journal, child_records, read_journal
from evolve.layer import NORM, adapter_position, block_position
from evolve.outcomes import Outcomes
from evolve.report.baselines import read_baselines
from evolve.report.content import SEARCH, compare, cost_of, rank, read_content
from evolve.report.mutations import payoffs
from evolve.report.searches import ROOT, parse_search, read_searches
from evolve.report.structure import UNKNOWN, arrange, structure_of
from evolve.report.tables import tables, to_csv
from evolve.report.tuning import varied
from tests.support.fake_trainer import FakeTrainer
from tests.support.reported import make_baseline, make_child, make_content, make_paths, make_search, make_task
from tests.support.searched import add_baseline, searched_system


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """Three tasks, two rounds of sixteen children each."""
    return searched_system(tmp_path_factory.mktemp("searched") / "system", 3, rounds=2)


# Searches


def test_searches_say_what_their_journals_say(system):
    searches, findings = read_searches(system.folder)
    assert findings == []
    assert [(search.task, search.round) for search in searches] == [
        *(("digits", 0), ("greek", 0), ("armenian", 0)),
        *(("digits", 1), ("greek", 1), ("armenian", 1)),
    ]
    for search in searches:
        records = read_journal(system.journal_file(search.task, search.round))
        rows = [row for _, row in child_records(records)]
        assert [child.path_id for child in search.children] == [row["path_id"] for row in rows]
        assert [child.score for child in search.children] == [row["score"] for row in rows]
        assert [child.number for child in search.children] == list(range(16))
        assert [(child.generation, child.index) for child in search.children] == [(n // 8, n % 8) for n in range(16)]
        assert search.num_planned == 16
        assert search.num_generations == 2
        assert search.generation == 1
        assert search.end is not None
        assert search.end.path_id == records[-1]["path_id"]
        for child, (plan, row) in zip(search.children, child_records(records), strict=True):
            trained = [position for position, origin in plan["origins"] if origin != "shared"]
            assert child.trained_layers == tuple(layer for position, layer in row["layers"] if position in trained)
            assert child.diverged == (row["interval_qualities"][-1] == 0)
    assert sum(search.num_diverged for search in searches) > 0
    second = next(search for search in searches if (search.task, search.round) == ("digits", 1))
    first = next(search for search in searches if (search.task, search.round) == ("digits", 0))
    assert first.quality_before is None
    assert second.quality_before == first.end.quality
    assert {child.parent for child in first.children} == {ROOT, "digits"}
    assert {child.parent for child in second.children} >= {"greek", "armenian"}


def test_an_unfinished_search_is_told_as_far_as_it_went(system, tmp_path):
    lines = system.journal_file("greek", 0).read_bytes().splitlines(keepends=True)
    (tmp_path / "journal").mkdir()
    file = tmp_path / "journal" / "greek-0001.jsonl"
    file.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    ((search,), findings) = read_searches(tmp_path)
    assert findings == []
    assert search.end is None
    assert len(search.children) == 3
    assert search.generation == 0
    assert search.best == max((child for child in search.children if child.survived), key=lambda child: child.score)
    assert search.other_seconds is None


def test_journals_that_cannot_be_read_are_findings(system, tmp_path):
    (tmp_path / "journal").mkdir()
    good = system.journal_file("greek", 0).read_bytes()
    (tmp_path / "journal" / "greek-0001.jsonl").write_bytes(good)
    (tmp_path / "journal" / "digits-0001.jsonl").write_bytes(good)
    (tmp_path / "journal" / "nko-0001.jsonl").write_bytes(good.replace(b"quality", b"quantity", 1))
    (tmp_path / "journal" / "lao-0001.jsonl").write_bytes(good[:50])
    searches, findings = read_searches(tmp_path)
    assert [search.task for search in searches] == ["greek"]
    assert len(findings) == 2
    assert "found the journal of round 1 of 'greek'" in findings[0]
    assert "altered line" in findings[1]
    assert parse_search([]) is None


def test_a_child_that_answers_nothing_rightly_has_not_diverged(tmp_path):
    system = searched_system(tmp_path / "system", 1, children=8, trainer=FakeTrainer(quality=lambda plan, child: 0.0))
    content = read_content(system)
    assert [search.num_diverged for search in content.searches] == [0]
    assert content.summary.tasks[0].outcomes == Outcomes(trained=8, survived=8)


def test_what_became_of_children_is_the_same_in_a_report_as_in_a_summary(tmp_path):
    system = searched_system(tmp_path / "system", 2, children=32, early_stop=True)
    content = read_content(system)
    for task in content.summary.tasks:
        (search,) = content.searches_of(task.name)
        (cost,) = (cost for cost in content.costs if cost.task == task.name)
        for counted in (search, cost):
            assert counted.num_survived == task.outcomes.survived
            assert counted.num_diverged == task.outcomes.diverged
            assert counted.num_stopped_early == task.outcomes.stopped_early
    assert sum(search.num_stopped_early for search in content.searches) > 0
    assert sum(search.num_diverged for search in content.searches) > 0


def test_a_system_is_reported_although_a_journal_of_a_closed_search_is_altered(tmp_path):
    system = searched_system(tmp_path / "system", 2, children=8)
    file = system.journal_file("digits", 0)
    file.write_bytes(file.read_bytes().replace(b"quality", b"quantity"))
    content = read_content(system)
    outcomes = {task.name: task.outcomes for task in content.summary.tasks}
    assert outcomes["digits"] is None
    assert outcomes["greek"].trained == 8
    assert [search.task for search in content.searches] == ["greek"]
    assert len(content.findings) == 1
    assert "altered line" in content.findings[0]


def test_other_time_of_a_resumed_search_is_that_of_the_process_that_closed_it():
    search = make_search(make_child(0), make_child(1))
    assert search.other_seconds == pytest.approx(0.5)
    end = dataclasses.replace(search.end, wall_seconds=4.0, reused_seconds=search.children[0].seconds)
    assert dataclasses.replace(search, end=end).other_seconds == pytest.approx(0.5)
    end = dataclasses.replace(end, reused_seconds=None)
    assert dataclasses.replace(search, end=end).other_seconds is None, "an earlier version did not say"


# Leaderboard and baselines


def test_tasks_are_ranked_with_their_best_rivals():
    tasks = [
        make_task("one", test_accuracy=0.7),
        make_task("two", test_accuracy=0.9),
        make_task("three", test_accuracy=None, quality=0.8),
    ]
    baselines = [
        make_baseline("finetune", "one", test_accuracy=0.75),
        make_baseline("freeze:2", "one", test_accuracy=0.5, quality=0.99),
        make_baseline("finetune", "three", test_accuracy=None, quality=0.6),
    ]
    standings = rank(tasks, baselines)
    assert [standing.task.name for standing in standings] == ["two", "three", "one"]
    assert [standing.is_tested for standing in standings] == [True, False, True]
    assert standings[0].rival is None
    assert standings[0].margin is None
    assert standings[1].margin == pytest.approx(0.2)
    assert standings[2].rival.method == "finetune"
    assert standings[2].margin == pytest.approx(-0.05)


def test_methods_are_compared_over_the_tasks_that_both_were_tested_on():
    tasks = [make_task("one", test_accuracy=0.7), make_task("two", test_accuracy=0.9), make_task("three", test_accuracy=None)]
    baselines = [
        make_baseline("finetune", "one", test_accuracy=0.6),
        make_baseline("finetune", "two", test_accuracy=0.7),
        make_baseline("freeze:2", "two", test_accuracy=0.85, num_trained_images=7),
        make_baseline("adapters:8", "three", test_accuracy=None),
    ]
    searches = [make_search(make_child(0), task=name) for name in ("one", "two", "three")]
    rows = compare(tasks, baselines, [cost_of(search.task, searches) for search in searches])
    # Freeze has a higher mean than finetune or the search, but of the easier task alone.
    assert [row.method for row in rows] == [SEARCH, "freeze:2", "finetune"]
    assert [row.num_tasks for row in rows] == [2, 1, 2]
    assert [row.accuracy for row in rows] == pytest.approx([0.8, 0.85, 0.65])
    assert [row.margin for row in rows] == pytest.approx([0.0, -0.05, -0.15])
    assert [row.num_trained_images for row in rows] == [200, 7, 2000]
    assert compare(tasks, [], []) == []


def test_baselines_are_read_and_unfinished_ones_named(system, tmp_path):
    assert read_baselines(tmp_path) == ([], [])
    copied = searched_system(tmp_path / "system", 1, children=8)
    add_baseline(copied, "freeze:2", "digits")
    add_baseline(copied, "finetune-tuned", "digits", quality=0.25)
    add_baseline(copied, "finetune", "digits", is_finished=False)
    damaged = add_baseline(copied, "adapters:8", "digits")
    damaged.write_bytes(damaged.read_bytes().replace(b"quality", b"quantity"))
    baselines, findings = read_baselines(copied.folder)
    assert [base.method for base in baselines] == ["finetune (tuned)", "freeze:2"]
    assert baselines[0].quality == 0.25
    assert baselines[1].train_seconds == 40.0
    assert len(findings) == 2
    assert "adapters-8" in findings[0]
    assert findings[1] == "the baseline finetune of digits is unfinished; it is left out"


def test_a_baseline_of_other_data_is_not_compared_with_the_search(tmp_path):
    system = searched_system(tmp_path / "system", 1, children=16)
    for method, fingerprint in (("freeze:2", "f-digits"), ("finetune", "f-other")):
        add_baseline(system, method, "digits", data_fingerprint=fingerprint)
    content = read_content(system)
    assert [base.method for base in content.baselines] == ["freeze:2"]
    assert content.standings[0].rival.method == "freeze:2"
    assert content.findings == ("the baseline finetune of digits had other data than the search; it is left out",)


def test_a_baseline_that_was_trained_shorter_than_the_search_is_named(tmp_path):
    system = searched_system(tmp_path / "system", 1, children=8)
    add_baseline(system, "freeze:2", "digits", num_trained_images=8 * 1280)
    add_baseline(system, "finetune", "digits", num_trained_images=4 * 1280)
    (finding,) = read_content(system).findings
    assert finding == (
        "the baseline finetune of digits was trained on 5,120 images and the search on 10,240: the comparison is not one of equal steps"
    )


def test_garbage_is_not_collected_between_one_look_and_the_next(tmp_path, monkeypatch):
    system = searched_system(tmp_path / "system", 1, children=8)

    def wait():
        raise TimeoutError

    def look(*arguments):
        with pytest.raises(TimeoutError), system.locks.collecting(only_looks=False, waits=wait):
            pass
        return structure_of(*arguments)

    monkeypatch.setattr("evolve.report.content.structure_of", look)
    assert read_content(system).structure.tasks == ("digits",)


# Structure


def test_layers_of_the_model_stand_once_and_their_users_side_by_side():
    paths = make_paths(
        {
            "a": {block_position(1): "x"},
            "b": {NORM: "n"},
            "c": {block_position(1): "x", adapter_position(0): "y"},
            "d": {block_position(2): ""},
        }
    )
    trainers = {"x": "a", "n": "b", "y": "c", **{f"head of {task}": task for task in "abcd"}}
    root_ids = {layer_id for path in paths.values() for layer_id in path.layer_ids if layer_id.startswith("root ")}
    structure = arrange(paths, trainers | dict.fromkeys(root_ids, ROOT), root_ids)
    assert sorted(structure.tasks) == ["a", "b", "c", "d"]
    assert abs(structure.tasks.index("a") - structure.tasks.index("c")) == 1, "they share a layer of their own"
    assert [row.position for row in structure.rows] == [
        *("patch_embed", "class_token", "pos_embed", "adapter.0", "block.0", "block.1", "block.2", "norm", "head"),
    ]
    ids = [layer.layer_id for row in structure.rows for layer in row.layers]
    assert len(ids) == len(set(ids)) == len({layer_id for path in paths.values() for layer_id in path.layer_ids})
    for row in structure.rows:
        assert sorted(row.lanes) == ["a", "b", "c", "d"]
        for layer in row.layers:
            assert layer.tasks == row.lanes[layer.first_lane : layer.first_lane + len(layer.tasks)]
            assert set(layer.tasks) == {task for task, path in paths.items() if layer.layer_id in path.layer_ids}
    by_id = {layer.layer_id: layer for row in structure.rows for layer in row.layers}
    assert set(by_id["x"].tasks) == {"a", "c"}
    assert by_id["x"].trained_by == "a"
    assert by_id["root block.2"].trained_by == ROOT
    assert set(by_id["root block.2"].tasks) == {"a", "b", "c"}, "d has dropped it"
    common = {(pair.task, pair.other): pair for pair in structure.in_common}
    assert len(common) == 16
    # patch_embed, class_token, pos_embed, block.0, block.1, block.2, norm
    assert (common["a", "c"].num_layers, common["a", "c"].num_trained, common["a", "c"].num_parameters) == (7, 1, 70)
    assert (common["a", "b"].num_layers, common["a", "b"].num_trained) == (5, 0)
    assert (common["c", "c"].num_layers, common["c", "c"].num_trained) == (9, 3)


def test_where_nothing_parts_lines_are_straight():
    paths = make_paths({name: {} for name in "abcde"})
    roots = {layer_id for path in paths.values() for layer_id in path.layer_ids}
    structure = arrange(paths, dict.fromkeys(roots, ROOT), roots)
    assert {row.lanes for row in structure.rows} == {structure.tasks}


def test_who_trained_a_layer_follows_from_the_journals(system):
    searches, _ = read_searches(system.folder)
    structure = structure_of(system, searches)
    layers = [layer for row in structure.rows for layer in row.layers]
    trained = {
        layer_id: search.task for search in reversed(searches) for child in search.children for layer_id in child.trained_layers
    }
    for layer in layers:
        assert layer.trained_by == (ROOT if layer.layer_id in system.root.layer_ids else trained[layer.layer_id])
    assert all(layer.trained_by == layer.tasks[0] for layer in layers if layer.position == "head")
    assert sum(layer.num_parameters for layer in layers) == sum(
        {layer.id: layer.num_parameters for r in system.tasks().values() for _, layer in system.path(r.path_id).layers}.values()
    )


def test_without_a_journal_a_layer_is_its_only_users(system):
    layers = [layer for row in structure_of(system, []).rows for layer in row.layers]
    for layer in layers:
        if layer.layer_id not in system.root.layer_ids:
            assert layer.trained_by == (layer.tasks[0] if len(layer.tasks) == 1 else UNKNOWN)


# Mutations and hyperparameters


def test_mutations_pay_as_far_as_their_children_beat_their_parents():
    data = make_child().hyperparameters
    children = [
        make_child(0, score=0.5),
        make_child(1, parent_id="path-0", parent_score=0.5, score=0.6, mutations=("learning_rate: 0.01 -> 0.02", "norm: clone")),
        make_child(
            2,
            parent_id="path-0",
            parent_score=0.5,
            score=0.4,
            survived=False,
            mutations=("learning_rate: 0.01 -> 0.02", "block.0: clone", "block.2: clone"),
        ),
        make_child(
            3,
            parent_id="path-1",
            parent_score=0.6,
            score=0.5,
            survived=False,
            mutations=("momentum: 0.2 -> none", "schedule: cosine -> restarts", "nesterov: false -> true"),
            hyperparameters={**data, "image_size": 48, "flip": False},
        ),
    ]
    rows = payoffs([make_search(*children)])
    found = {row.kind: (row.num_children, row.num_better, pytest.approx(row.mean_gain)) for row in rows}
    assert found == {
        "any child": (3, 1, -0.1 / 3),
        "norm clone": (1, 1, 0.1),
        "learning_rate up": (2, 1, 0.0),
        "block clone": (1, 0, -0.1),
        "momentum down": (1, 0, -0.1),
        "schedule to restarts": (1, 0, -0.1),
        "nesterov to true": (1, 0, -0.1),
        "image_size up": (1, 0, -0.1),
        "flip to false": (1, 0, -0.1),
    }
    assert [row.kind for row in rows][:3] == ["any child", "norm clone", "learning_rate up"]
    assert payoffs([make_search(make_child(0))]) == []


def test_only_hyperparameters_that_varied_are_shown():
    data = make_child().hyperparameters
    children = [make_child(n, hyperparameters={**data, "momentum": m, "flip": n == 1}) for n, m in enumerate((0.9, None, 0.2))]
    assert varied([make_search(*children)]) == {"momentum": [None, 0.2, 0.9], "flip": [False, True]}


# Cost


def test_costs_are_sums_over_the_rounds_of_a_task():
    searches = [
        make_search(make_child(0), make_child(1, diverged=True, survived=False)),
        make_search(make_child(0), round=1, end=None),
        make_search(make_child(0), task="two"),
    ]
    cost = cost_of("one", searches)
    assert (cost.num_searches, cost.num_children, cost.num_survived, cost.num_diverged) == (2, 3, 2, 1)
    assert (cost.num_trained_images, cost.flops) == (300, 3e9)
    assert (cost.train_seconds, cost.evaluate_seconds, cost.examine_seconds) == (6.0, 3.0, 0.5)
    assert cost.other_seconds == pytest.approx(0.5)
    assert cost.seconds == pytest.approx(10.0)


# Tables


def test_every_table_has_one_sort_of_row_and_every_child_is_in_one(system):
    content = read_content(system)
    every = tables(content)
    for name, table in every.items():
        assert len({tuple(row) for row in table}) <= 1, name
    assert len(every["children"]) == 96
    assert sum(row["is_current"] for row in every["children"]) >= 3
    assert every["leaderboard"][0]["task"] == content.standings[0].task.name
    assert every["baselines"] == every["methods"] == []
    assert [row["num_children"] for row in every["costs"]] == [32, 32, 32]
    assert json.loads(json.dumps(every)) == every
    lines = to_csv(every["searches"]).splitlines()
    assert lines[0].startswith("task,round,closed,num_planned,num_children")
    assert lines[1].startswith("digits,1,True,16,16")
    assert len(lines) == 7


def test_a_table_without_rows_is_empty_and_words_are_quoted():
    assert to_csv([]) == ""
    assert to_csv([{"a": 'x,"y"', "b": None}]) == 'a,b\n"x,""y""",\n'


def test_all_methods_have_their_row():
    content = make_content(3, methods=("finetune", "freeze:1"), num_blocks=2)
    assert {row["method"] for row in tables(content)["methods"]} == {"search", "finetune", "freeze:1"}


def test_a_system_without_tasks_can_be_reported(tmp_path):
    from evolve.store import System
    from tests.support.fake_trainer import tiny_root

    content = read_content(System.create(tmp_path / "system", tiny_root(), 32))
    assert (content.standings, content.searches, content.structure.tasks) == ((), (), ())


def test_a_journal_that_only_opened_has_no_children(tmp_path, system):
    opened = read_journal(system.journal_file("digits", 0))[0]
    journal = Journal(tmp_path / "journal" / "digits-0001.jsonl")
    journal.append("open", {key: value for key, value in opened.items() if key not in ("crc32", "sequence", "type")})
    journal.close()
    ((search,), _) = read_searches(tmp_path)
    assert (search.children, search.best, search.generation) == ((), None, -1)
