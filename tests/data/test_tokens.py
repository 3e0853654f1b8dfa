"""Rows to tokens: loss on the completion, what is too long is cut and counted, what keeps none is set aside."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.backbone import load_tokenizer
from client.data import ColumnNames, prepare_classification, prepare_language
from client.data.tokens import class_names, encode_prompt
from common.errors import InvalidInput

NONE = ColumnNames()


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load_tokenizer(tiny_llama)


@pytest.fixture(scope="module")
def bert(tiny_bert):
    return load_tokenizer(tiny_bert)


def rows(*pairs, prompt="prompt", completion="completion"):
    return [{prompt: p, completion: c} for p, c in pairs]


def completion_of(example, tokenizer):
    return tokenizer.decode(example.input_ids[example.labels != -100])


def test_the_loss_is_on_the_completion_and_its_end(llama):
    (example,) = prepare_language(rows(("2+2?", "4")), llama, 32, NONE).examples
    assert llama.decode(example.input_ids) == "<s>2+2?\n4</s>"
    assert completion_of(example, llama) == "4</s>"
    assert list(example.input_ids[: len(encode_prompt(llama, "2+2?"))]) == encode_prompt(llama, "2+2?")


@pytest.mark.parametrize(("prompt", "completion"), [("question", "answer"), ("instruction", "output")])
def test_usual_column_names_are_found(llama, prompt, completion):
    found = prepare_language(rows(("a", "b"), prompt=prompt, completion=completion), llama, 32, NONE)
    assert completion_of(found.examples[0], llama) == "b</s>"


def test_named_columns_win_over_usual_ones(llama):
    row = {"prompt": "no", "completion": "no", "q": "a", "a": "b"}
    found = prepare_language([row], llama, 32, ColumnNames(prompt="q", completion="a"))
    assert llama.decode(found.examples[0].input_ids) == "<s>a\nb</s>"


def test_a_text_column_is_trained_on_whole(llama):
    (example,) = prepare_language([{"text": "abc"}], llama, 32, NONE).examples
    assert completion_of(example, llama) == "abc</s>"
    assert example.labels[0] == -100


def test_messages_go_through_the_tokenizers_chat_template(llama):
    messages = [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"},
        {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"},
        {"role": "user", "content": "thanks"},
    ]  # fmt: skip
    found = prepare_language([{"messages": messages}], llama, 64, NONE)
    assert completion_of(found.examples[0], llama) == "4</s>"
    assert llama.decode(found.examples[0].input_ids).endswith("<assistant>4</s>")


def test_messages_without_an_answer_are_set_aside(llama):
    found = prepare_language([{"messages": [{"role": "user", "content": "hi"}]}], llama, 32, NONE)
    assert (found.examples, found.set_aside) == ((), 1)


@pytest.mark.parametrize("messages", [None, "hi", [{"content": "x"}], [1]])
def test_messages_of_another_form_are_named_by_row(llama, messages):
    with pytest.raises(InvalidInput, match="row 1: 'messages' must be a list"):
        prepare_language([{"messages": messages}], llama, 32, NONE)


def test_messages_without_a_template_are_refused(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = None
    with pytest.raises(InvalidInput, match="no chat template"):
        prepare_language([{"messages": []}], tokenizer, 32, NONE)


def test_a_template_that_refuses_a_turn_names_the_row(tiny_llama):
    tokenizer = load_tokenizer(tiny_llama)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    row = {"messages": [{"role": "assistant", "content": "x"}]}
    with pytest.raises(InvalidInput, match="row 1: the chat template refuses"):
        prepare_language([row], tokenizer, 32, NONE)


def test_a_record_longer_than_the_context_is_cut_at_its_end_and_counted(llama):
    found = prepare_language(rows(("abcd", "x" * 100), ("a", "b")), llama, 20, NONE)
    assert (found.truncated, found.set_aside) == (1, 0)
    long, short = found.examples
    assert len(long.input_ids) == 20
    assert completion_of(long, llama) == "x" * (20 - len(encode_prompt(llama, "abcd")))
    assert completion_of(short, llama) == "b</s>"


@pytest.mark.parametrize(("prompt", "completion"), [("p" * 100, "c"), ("p", ""), ("p", None), ("", "")])
def test_a_record_without_a_completion_token_is_set_aside_and_counted(llama, prompt, completion):
    found = prepare_language(rows((prompt, completion), ("a", "b")), llama, 20, NONE)
    assert len(found.examples) == 1
    assert found.set_aside == 1


def test_a_missing_column_lists_the_columns_there_are(llama):
    with pytest.raises(InvalidInput, match="no column for the completion found: there are 'prompt', 'other'"):
        prepare_language([{"prompt": "a", "other": "b"}], llama, 32, NONE)
    with pytest.raises(InvalidInput, match="no column 'q' for the prompt: there are 'prompt', 'completion'"):
        prepare_language(rows(("a", "b")), llama, 32, ColumnNames(prompt="q"))


@pytest.mark.parametrize("value", [3, ["a"], {"a": 1}, True])
def test_a_value_that_is_no_text_names_row_and_column(llama, value):
    with pytest.raises(InvalidInput, match="row 2: column 'completion' holds"):
        prepare_language(rows(("a", "b"), ("a", value)), llama, 32, NONE)


def test_half_a_surrogate_pair_names_row_and_column(llama):
    with pytest.raises(InvalidInput, match="row 1: column 'prompt' holds half a surrogate pair"):
        prepare_language(rows(("\ud800", "b")), llama, 32, NONE)


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=4), st.integers(4, 40))
def test_every_record_is_kept_within_the_length_or_counted(llama, pairs, length):
    found = prepare_language(rows(*pairs), llama, length, NONE)
    assert len(found.examples) + found.set_aside == len(pairs)
    for example in found.examples:
        assert len(example.input_ids) == len(example.labels) <= length
        assert (example.labels[1:] != -100).any(), "the model predicts at least one token"
        kept = example.labels != -100
        np.testing.assert_array_equal(example.labels[kept], example.input_ids[kept])


CLASSES = ("bad", "good")


def test_a_class_is_its_place_among_the_names(bert):
    found = prepare_classification(
        [{"text": "x", "label": "good"}, {"text": "y", "label": "bad"}], bert, 16, NONE, CLASSES
    )
    assert [example.labels for example in found.examples] == [1, 0]
    assert bert.decode(found.examples[0].input_ids) == "[CLS]x[SEP]"


def test_a_long_text_is_cut_keeps_its_separator_and_is_counted(bert):
    found = prepare_classification([{"text": "x" * 90, "label": "bad"}], bert, 10, NONE, CLASSES)
    assert found.truncated == 1
    assert bert.decode(found.examples[0].input_ids) == "[CLS]" + "x" * 8 + "[SEP]"


def test_two_texts_are_a_pair(bert):
    row = {"text_a": "x", "text_b": "y", "label": "bad"}
    found = prepare_classification([row], bert, 16, NONE, CLASSES)
    assert bert.decode(found.examples[0].input_ids) == "[CLS]x[SEP]y[SEP]"


def test_a_class_that_is_none_of_the_names_names_the_row(bert):
    with pytest.raises(InvalidInput, match="row 1: class 'ugly' is none of bad, good"):
        prepare_classification([{"text": "x", "label": "ugly"}], bert, 16, NONE, CLASSES)


@pytest.mark.parametrize("second", [{"text": "y"}, {"text": "y", "label": None}])
def test_a_row_without_a_class_is_named(bert, second):
    every = [{"text": "x", "label": "bad"}, second]
    with pytest.raises(InvalidInput, match="row 2: no class in column 'label'"):
        prepare_classification(every, bert, 16, NONE, CLASSES)
    with pytest.raises(InvalidInput, match="row 2: no class in column 'label'"):
        class_names(every, NONE)


def test_names_of_classes_are_sorted_numbers_by_size():
    assert class_names([{"label": n} for n in (10, 2, 1, 2)], NONE) == ("1", "2", "10")
