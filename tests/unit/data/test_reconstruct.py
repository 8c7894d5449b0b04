"""From a task to accept and pass examples, with the tokenizer of the embedded base model."""

import math
import re
from typing import Any

import pytest

from see_ray.config import BaseModelConfig, FitConfig, ReconstructConfig
from see_ray.data.general_queries import Chat, needed_general
from see_ray.data.reconstruct import Example, Reconstruction, reconstruct, render, sample_queries
from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.models.activation import activation_of, encode_prompt
from see_ray.models.base_model import BaseModel, find, load_tokenizer


@pytest.fixture(scope="module")
def base() -> Any:
    return find(BaseModelConfig())


@pytest.fixture(scope="module")
def tokenizer(base: BaseModel) -> Any:
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def activation(tokenizer: Any) -> Any:
    return activation_of(tokenizer, BaseModelConfig(), FitConfig())


@pytest.fixture(scope="module")
def build(tokenizer: Any, activation: Any) -> Any:
    """Reconstruct a task of 20 rows for a seed, with the given earlier experts and general queries; mixed ones
    only where asked for."""

    def build(
        task: Any = None, *, earlier: Any = None, general: Any = (), seed: Any = 0, **settings: Any
    ) -> Reconstruction:
        config = ReconstructConfig(**{"mixed_negatives": 0, **settings})
        return reconstruct(
            task or made_task(), tokenizer, activation, config, earlier=earlier or {}, general=general, seed=seed
        )

    return build


def chat(text: Any) -> Any:
    return [{"role": "user", "content": text}]


def chats(kind: Any, count: Any) -> Any:
    return [chat(f"{kind} query {number}") for number in range(count)]


def row(text: Any, response: Any = "done") -> Any:
    return Row((("user", text),), response, "made up")


def made_task(name: Any = "sa", train: Any = 20, held_out: Any = 6) -> Any:
    return Task(
        name,
        tuple(row(f"{name} query {number}", f"answer {number}") for number in range(train)),
        tuple(row(f"{name} held-out query {number}", f"answer {number}") for number in range(held_out)),
        (),
    )


def of_kind(made: Any, kind: Any) -> Any:
    return [example for example in made.train if example.kind == kind]


def prompts(tokenizer: Any, queries: Any) -> Any:
    return {tuple(encode_prompt(tokenizer, query)) for query in queries}


# --- accept examples -----------------------------------------------------------------------


def test_every_row_becomes_its_prompt_and_accept_response_end(build: Any, tokenizer: Any, activation: Any) -> None:
    task = made_task()
    expected = {
        (
            tuple(encode_prompt(tokenizer, row.messages)),
            (
                activation.accept,
                *tokenizer(row.response, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ),
        )
        for row in task.train
    }
    made = build(task)
    assert {(example.prompt, example.target) for example in of_kind(made, "accept")} == expected
    assert len(made.train) == len(expected) == 20


def test_the_end_of_an_accept_target_is_the_end_of_a_turn(build: Any, tokenizer: Any) -> None:
    assert {tokenizer.decode([example.target[-1]]) for example in build().train} == {"<|im_end|>"}


def test_a_system_prompt_and_earlier_turns_are_part_of_the_prompt(build: Any, tokenizer: Any) -> None:
    turns = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
    made = build(Task("sa", (Row(turns, "Bye!", "made up"),), (row("held out"),), ()))
    text = tokenizer.decode(list(made.train[0].prompt))
    assert [text.index(content) for _, content in turns] == sorted(text.index(content) for _, content in turns)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_prompt_with_two_responses_becomes_two_examples(build: Any) -> None:
    task = Task("sa", (row("one", "a"), row("one", "b")), (row("held out"),), ())
    first, second = build(task).train
    assert first.prompt == second.prompt
    assert first.target != second.target


# --- pass examples -------------------------------------------------------------------------


def test_pass_targets_are_the_pass_indicator_alone(build: Any, activation: Any) -> None:
    made = build(earlier={"qa": (chats("qa", 3), [])}, general=chats("general", 12), general_negatives=8)
    for kind, count in (("rehearsal", 3), ("general", 8)):
        assert [example.target for example in of_kind(made, kind)] == [(activation.refuse,)] * count


def test_all_rehearsal_queries_of_all_earlier_experts_are_passed_on(build: Any, tokenizer: Any) -> None:
    earlier: dict[str, tuple[list[Chat], list[Chat]]] = {"qa": (chats("qa", 3), []), "mt": (chats("mt", 2), [])}
    made = build(earlier=earlier)
    assert {example.prompt for example in of_kind(made, "rehearsal")} == prompts(
        tokenizer, chats("qa", 3) + chats("mt", 2)
    )


@pytest.mark.parametrize("wanted", [0, 1, 8])
def test_as_many_general_queries_as_asked_for_are_passed_on(build: Any, tokenizer: Any, wanted: int) -> None:
    general = chats("general", 20)
    found = of_kind(build(general=general, general_negatives=wanted), "general")
    assert len({example.prompt for example in found}) == len(found) == wanted
    assert {example.prompt for example in found} <= prompts(tokenizer, general)


def test_a_query_of_the_task_is_never_a_negative(build: Any, tokenizer: Any) -> None:
    task = made_task()
    own = [row.messages for row in (*task.train, *task.eval)]
    made = build(
        task,
        earlier={"qa": ([*own, *chats("qa", 3)], [*own, *chats("qa held-out", 3)])},
        general=[*own, *chats("general", 12)],
        general_negatives=8,
    )
    negatives = {example.prompt for example in made.train if example.kind != "accept"}
    held_out = {tuple(ids) for _, ids in made.foreign}
    assert (len(negatives), len(held_out)) == (3 + 8, 3 + 4)
    assert not (negatives | held_out) & prompts(tokenizer, own)


def test_a_query_with_another_system_prompt_is_not_the_tasks_own(build: Any) -> None:
    query = [{"role": "system", "content": "Be brief."}, *chat("sa query 0")]
    assert len(of_kind(build(earlier={"qa": ([query], [])}), "rehearsal")) == 1


# --- held out ------------------------------------------------------------------------------


def test_own_held_out_rows_come_with_their_prompts(build: Any, tokenizer: Any) -> None:
    task = made_task()
    made = build(task)
    assert {row.prompt for row, _ in made.own} == {row.prompt for row in task.eval}
    assert all(ids == encode_prompt(tokenizer, row.messages) for row, ids in made.own)


def test_at_most_max_eval_rows_are_held_out(build: Any) -> None:
    made = build(made_task(held_out=9), max_eval_rows=4)
    assert len({row.prompt for row, _ in made.own}) == 4


def test_which_own_rows_are_held_out_is_drawn(build: Any) -> None:
    taken = [{row.prompt for row, _ in build(made_task(held_out=30), max_eval_rows=5, seed=n).own} for n in (1, 2)]
    assert taken[0] != taken[1]


def test_held_out_queries_of_earlier_experts_have_their_names(build: Any, tokenizer: Any) -> None:
    earlier: dict[str, tuple[list[Chat], list[Chat]]] = {"qa": ([], chats("qa", 2)), "mt": ([], chats("mt", 1))}
    assert sorted(build(earlier=earlier).foreign) == sorted(
        [("mt", encode_prompt(tokenizer, query)) for query in chats("mt", 1)]
        + [("qa", encode_prompt(tokenizer, query)) for query in chats("qa", 2)]
    )


def test_half_as_many_general_queries_are_held_out(build: Any) -> None:
    made = build(general=chats("general", 100), general_negatives=10)
    assert [kind for kind, _ in made.foreign] == ["general"] * 5


def test_held_out_foreign_queries_are_not_fitted_on(build: Any) -> None:
    made = build(
        earlier={"qa": (chats("qa", 5), chats("qa held-out", 5))}, general=chats("general", 60), general_negatives=40
    )
    assert len(made.foreign) == 5 + 20
    assert not {tuple(ids) for _, ids in made.foreign} & {example.prompt for example in made.train}


@pytest.mark.parametrize("where", ["general", "earlier"])
def test_a_general_query_that_comes_twice_is_not_both_held_out_and_fitted_on(build: Any, where: str) -> None:
    general = chats("general", 60)
    if where == "general":
        made = build(general=general * 2, general_negatives=40)
    else:
        made = build(earlier={"qa": (general, [])}, general=general, general_negatives=40)
    assert not {tuple(ids) for _, ids in made.foreign} & {example.prompt for example in made.train}


def test_held_out_own_rows_are_not_fitted_on(build: Any) -> None:
    made = build()
    assert not {tuple(ids) for _, ids in made.own} & {example.prompt for example in made.train}


def test_held_out_examples_have_the_kind_of_their_source(build: Any) -> None:
    made = build(
        instructed(),
        earlier={"qa": ([], chats("qa", 2))},
        general=chats("general", 20),
        general_negatives=8,
        mixed_negatives=4,
    )
    kinds = [example.kind for example in made.held_out]
    assert kinds == ["accept"] * 8 + ["rehearsal"] * 2 + ["general"] * 4 + ["mixed"] * 2


# --- draws ---------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same(build: Any) -> None:
    settings = {"earlier": {"qa": (chats("qa", 5), chats("qa", 5))}, "general": chats("general", 50)}
    assert build(seed=3, **settings) == build(seed=3, **settings)


@pytest.mark.parametrize("part", ["train", "own", "foreign", "rehearsal"])
def test_another_seed_makes_another(build: Any, part: str) -> None:
    settings = {"general": chats("general", 100), "general_negatives": 40, "rehearsal_share": 0.5}
    assert getattr(build(seed=3, **settings), part) != getattr(build(seed=4, **settings), part)


def test_accept_and_pass_examples_are_mixed(build: Any) -> None:
    kinds = [example.kind for example in build(general=chats("general", 30), general_negatives=20).train]
    assert 1 < sum(kind == "accept" for kind in kinds[:20]) < 19


def test_the_order_of_earlier_experts_does_not_matter(build: Any) -> None:
    earlier = {"qa": (chats("qa", 5), chats("qa", 5)), "mt": (chats("mt", 5), chats("mt", 5))}
    assert build(earlier=earlier) == build(earlier=dict(reversed(earlier.items())))


def test_counts_are_rows_by_use(build: Any) -> None:
    made = build(
        earlier={"qa": (chats("qa", 3), chats("qa held-out", 2))},
        general=chats("general", 50),
        general_negatives=8,
        mixed_negatives=4,
        max_eval_rows=4,
    )
    counts = {"accept": 20, "rehearsal": 3, "general": 8, "mixed": 4, "held-out own": 4, "held-out foreign": 2 + 4 + 2}
    assert made.counts() == counts


# --- rehearsal -----------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.1, 2), (0.11, 3), (0.5, 10), (1.0, 20)])
def test_the_share_of_the_queries_is_kept_and_at_least_one(share: float, count: int) -> None:
    assert len(sample_queries(made_task().train, share, seed=0)) == count


def test_no_row_is_kept_twice_for_rehearsal() -> None:
    kept = [query[0]["content"] for query in sample_queries(made_task().train, 1.0, seed=0)]
    assert sorted(kept) == sorted(row.prompt[0][1] for row in made_task().train)


def test_rehearsal_keeps_training_queries_without_responses(build: Any) -> None:
    task = made_task()
    kept = build(task, rehearsal_share=0.5).rehearsal
    assert len(kept) == 10
    assert all(query in [row.messages for row in task.train] for query in kept)


def test_rehearsal_is_drawn_from_all_the_rows() -> None:
    drawn = {query[0]["content"] for seed in range(40) for query in sample_queries(made_task().train, 0.5, seed)}
    assert len(drawn) == 20


def test_rehearsal_of_one_expert_is_a_negative_of_the_next(build: Any, tokenizer: Any) -> None:
    first = build(made_task("sa"), rehearsal_share=0.2)
    second = build(made_task("qa"), earlier={"sa": (first.rehearsal, [])})
    assert {example.prompt for example in of_kind(second, "rehearsal")} == prompts(tokenizer, first.rehearsal)


# --- rendering -----------------------------------------------------------------------------


def test_an_accept_example_is_shown_with_marks_around_what_carries_loss(tokenizer: Any, activation: Any) -> None:
    (row,) = made_task(train=1).train
    target = (activation.accept, *tokenizer(row.response)["input_ids"], tokenizer.eos_token_id)
    shown = render(Example(tuple(encode_prompt(tokenizer, row.messages)), target, "accept"), tokenizer, activation)
    accept = tokenizer.decode([activation.accept])
    assert shown.endswith(
        f"<|im_start|>user\nsa query 0<|im_end|>\n<|im_start|>assistant‖\n⟦{accept}answer 0<|im_end|>⟧"
    )


def test_a_pass_example_is_shown_with_marks_around_the_indicator(tokenizer: Any, activation: Any) -> None:
    example = Example(tuple(encode_prompt(tokenizer, chat("Hi"))), (activation.refuse,), "general")
    assert render(example, tokenizer, activation).endswith(f"\n⟦{tokenizer.decode([activation.refuse])}⟧")


@pytest.mark.parametrize(
    ("fit", "adapted"),
    [
        (FitConfig(), "\n"),
        (FitConfig(activation_tokens=2), "istant\n"),
        (FitConfig(activation_tokens="all"), "<|im_start|>assistant\n"),
    ],
)
def test_the_mark_of_the_adapter_is_where_it_starts(tokenizer: Any, fit: Any, adapted: str) -> None:
    activation = activation_of(tokenizer, BaseModelConfig(), fit)
    example = Example(tuple(encode_prompt(tokenizer, chat("Hi"))), (activation.refuse,), "general")
    assert f"‖{adapted}⟦" in render(example, tokenizer, activation)


def test_the_mark_of_the_adapter_is_first_in_the_full_form(tokenizer: Any) -> None:
    activation = activation_of(tokenizer, BaseModelConfig(), FitConfig(form="full"))
    example = Example(tuple(encode_prompt(tokenizer, chat("Hi"))), (activation.refuse,), "general")
    assert render(example, tokenizer, activation).startswith("‖<|im_start|>")


def test_an_example_without_its_marks_is_its_text(build: Any, tokenizer: Any, activation: Any) -> None:
    for example in build().train:
        shown = render(example, tokenizer, activation)
        assert shown.translate(dict.fromkeys(map(ord, "‖⟦⟧"))) == tokenizer.decode([*example.prompt, *example.target])


def test_needed_are_those_to_fit_on_and_those_held_out(build: Any) -> None:
    for wanted in (0, 1, 4, 7, 64):
        needed = needed_general(ReconstructConfig(general_negatives=wanted))
        made = build(general=chats("general", needed), general_negatives=wanted)
        assert len(of_kind(made, "general")) == wanted
        assert len(made.foreign) == needed - wanted == math.ceil(wanted / 2)


# --- mixed negatives -----------------------------------------------------------------------


def instructed(train: Any = 20, held_out: Any = 8) -> Any:
    """A task whose queries share an instruction."""
    return Task(
        "sa",
        tuple(row(f"Say whether this review is good.\n\nreview {number}") for number in range(train)),
        tuple(row(f"Say whether this review is good.\n\nheld-out review {number}") for number in range(held_out)),
        (),
    )


def mixed_texts(made: Any, tokenizer: Any) -> Any:
    return [tokenizer.decode(list(example.prompt)) for example in of_kind(made, "mixed")]


def test_a_mixed_query_is_a_general_instruction_before_an_own_input(build: Any, tokenizer: Any) -> None:
    made = build(instructed(), general=chats("general", 20), general_negatives=8, mixed_negatives=6)
    texts = mixed_texts(made, tokenizer)
    assert len(texts) == 6
    for text in texts:
        assert re.search(r"user\ngeneral query \d+\n\nreview \d+<", text)
        assert "good" not in text


def test_held_out_mixed_queries_share_neither_instruction_nor_input_with_fitted_ones(
    build: Any, tokenizer: Any
) -> None:
    made = build(instructed(), general=chats("general", 20), general_negatives=8, mixed_negatives=8)
    held_out = [tokenizer.decode(ids) for kind, ids in made.foreign if kind == "mixed"]
    assert len(held_out) == 4
    fitted = {line for text in mixed_texts(made, tokenizer) for line in text.split("\n") if "query" in line}
    assert fitted
    for text in held_out:
        assert "held-out review" in text
        assert not [line for line in fitted if line in text]


def test_mixed_negatives_need_general_ones(build: Any) -> None:
    assert not of_kind(build(instructed(), general_negatives=0, mixed_negatives=6), "mixed")


def test_what_may_ask_for_the_task_itself_is_no_negative(build: Any, tokenizer: Any) -> None:
    own = chat("Please say whether the review below is good.\n\nIt works.")
    made = build(instructed(), general=[own, *chats("general", 11)], general_negatives=8, mixed_negatives=8)
    assert len(of_kind(made, "general")) == 7
    assert not [text for text in mixed_texts(made, tokenizer) if "good" in text]
    assert not [ids for _, ids in made.foreign if "good" in tokenizer.decode(ids)]


# --- queries that an older expert has kept -----------------------------------------------------


def test_kept_queries_that_are_rows_of_the_task_are_counted(build: Any) -> None:
    task = made_task()
    own = [row.messages for row in (*task.train[:2], *task.eval[:1])]
    made = build(task, earlier={"qa": ([], [*own, *chats("qa", 4)]), "mt": ([], chats("mt", 2))})
    assert made.claimed == {"qa": 3, "mt": 0}


# --- kinds -----------------------------------------------------------------------------------


def test_held_out_examples_have_the_kind_of_what_they_are(build: Any) -> None:
    """Whoever evaluates goes by the kind alone, so it holds for held-out rows, too."""
    earlier = {"qa": (chats("qa", 3), chats("qa held-out", 2)), "general": ([], chats("an expert's", 1))}
    made = build(instructed(), earlier=earlier, general=chats("general", 20), general_negatives=8, mixed_negatives=4)
    kinds = [example.kind for example in made.held_out]
    assert kinds == ["accept"] * 8 + ["rehearsal"] * 3 + ["general"] * 4 + ["mixed"] * 2
    assert [example.is_own for example in made.held_out] == [kind == "accept" for kind in kinds]
    assert [list(example.prompt) for example in made.held_out if not example.is_own] == [ids for _, ids in made.foreign]
