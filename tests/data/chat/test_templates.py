"""Traps of chat templates, each by its name in the design, on three tokenizers."""

from __future__ import annotations

import inspect
import json
import random

import numpy as np
import pytest
from transformers import AutoTokenizer

from equilibrium_mcore.config.chat import JinjaTemplateConfig
from equilibrium_mcore.config.data import TokenizerConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer
from equilibrium_mcore.data.chat.render import build_renderer
from equilibrium_mcore.data.chat.segments import Turn, joined
from equilibrium_mcore.data.chat.templates import TEMPLATES
from equilibrium_mcore.data.chat.vocabulary import ChatVocabulary
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.hugging_face.chat_files import check_same_chats
from equilibrium_mcore.hugging_face.tokenizer_files import write_tokenizer
from tests.data.chat.conftest import TOKENIZERS
from tests.data.chat.support import messages_of, random_chats

CHATS = random_chats(200)
MARKED = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|im_end|>{% endgeneration %}
{%- else %}{{ m.content | trim }}<|im_end|>{% endif %}

{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

# A call of `apply_chat_template` takes 10 ms, so that 200 chats are compared for some only.
PAIRS = {
    ("sentencepiece", "chatml"): 200,
    ("llama3", "llama3"): 200,
    ("qwen2", "chatml"): 40,
    ("llama3", "plain"): 40,
    ("sentencepiece", "plain"): 40,
    ("sentencepiece", "llama3"): 40,
    ("llama3", "marked"): 40,
    ("sentencepiece", "unmarked"): 40,
}
PLAIN = {"sentencepiece"}  # text that spells a control token trains as text
each_pair = pytest.mark.parametrize(("name", "template"), PAIRS)
each_template = pytest.mark.parametrize("template", [*TEMPLATES, "marked", "unmarked"])


@pytest.fixture(scope="session")
def renderer_of(chat_tokenizers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    choices = dict(zip(TEMPLATES, TEMPLATES, strict=True))
    for name, source in (("marked", MARKED), ("unmarked", UNMARKED)):
        (folder / name).write_text(source)
        choices[name] = JinjaTemplateConfig(jinja=folder / name)
    return lambda name, template: build_renderer(choices[template], chat_tokenizers[name])


@pytest.fixture(scope="session")
def released(renderer_of, chat_tokenizers, tmp_path_factory):
    """transformers' tokenizer of an exported folder, by tokenizer and template."""
    made = {}

    def make(name, template):
        if (name, template) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-{template}")
            write_tokenizer(chat_tokenizers[name], folder, renderer=renderer_of(name, template))
            made[name, template] = AutoTokenizer.from_pretrained(folder)
        return made[name, template]

    return make


def ids_and_mask(renderer, turns, **settings):
    ids, produced = joined(renderer.segments(turns, **settings))
    return ids.tolist(), produced.tolist()


@each_pair
def test_trap_1_template_tokenized_as_text(renderer_of, released, name, template):
    """200 random chats: our ids are those of the exported template, and no user makes a turn."""
    renderer, theirs = renderer_of(name, template), released(name, template)
    special = set(renderer.vocabulary.controls.values())
    differing = 0
    chats = CHATS[: PAIRS[name, template]]
    for turns in chats:
        ids, produced = ids_and_mask(renderer, turns)
        found = theirs.apply_chat_template(
            messages_of(turns), return_dict=True, return_assistant_tokens_mask=True
        )
        if template in TEMPLATES:
            assert found["input_ids"] == ids
            assert found["assistant_masks"] == [int(p) for p in produced]
        else:  # text of a template of one's own may grow together with an answer's first token
            differing += found["input_ids"] != ids
        # As many control tokens as with nothing said at all: text made none.
        silent = [turn._replace(content="") for turn in turns]
        controls = [i for i in ids if i in special]
        assert controls == [i for i in ids_and_mask(renderer, silent)[0] if i in special]
    assert differing <= 0.2 * len(chats)


@each_pair
def test_trap_2_ids_change_at_the_border(renderer_of, released, name, template):
    """What a model is asked with is how the training example begins, and the answer follows."""
    renderer, theirs = renderer_of(name, template), released(name, template)
    for turns in CHATS[:15]:
        whole, produced = ids_and_mask(renderer, turns)
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            asked = ids_and_mask(renderer, turns[:number], prompt=True)[0]
            assert whole[: len(asked)] == asked
            assert not produced[len(asked) - 1] and produced[len(asked)]
            if template in TEMPLATES:
                prompt = messages_of(turns[:number])
                assert asked == theirs.apply_chat_template(
                    prompt, add_generation_prompt=True, return_dict=False
                )


def test_trap_2_is_real(tmp_path):
    """Encoded as one text, a header and a content do grow together."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=6)) for _ in range(300)]
    lines = [f"assistant\n\n    return {word}\n" for word in words]
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": line * 3}) + "\n" for line in lines))
    train_tokenizer(inputs=[text], output=tmp_path / "t.model", vocab_size=512, threads=1)
    kind = {"type": "SentencePieceTokenizer", "model": tmp_path / "t.model"}
    tokenizer = load_tokenizer(TokenizerConfig(**kind))
    header = tokenizer.encode("assistant\n")
    assert tokenizer.encode("assistant\n\n    return x")[: len(header)] != header


def test_trap_3_ids_are_made_once():
    """Nothing that packs, orders or gives out examples can encode."""
    from equilibrium_mcore.data.chat import dataset, epochs, examples, fill, order

    for module in (dataset, epochs, examples, fill, order):
        source = inspect.getsource(module)
        assert "encode(" not in source and "import Tokenizer" not in source


@each_pair
def test_trap_4_doubled_bos(renderer_of, name, template):
    """Each control token of the template as often as the template writes it."""
    renderer = renderer_of(name, template)
    begin = renderer.vocabulary.controls["<|begin_of_text|>"]
    for turns in CHATS[:15]:
        ids, _ = ids_and_mask(renderer, turns)
        assert ids.count(begin) == (1 if template == "llama3" else 0)
        assert ids[0] != renderer.vocabulary.tokenizer.eod
        ends = len(turns)
        assert ids.count(renderer.stop) == ends


@each_pair
def test_trap_5_end_token_not_learned(renderer_of, name, template):
    """The end token of an answer is produced, also of an empty one; what follows it is not."""
    renderer = renderer_of(name, template)
    for turns in CHATS[:15]:
        ids, produced = ids_and_mask(renderer, turns)
        ends = [i for i, index in enumerate(ids) if index == renderer.stop]
        said = [turn.role == "assistant" for turn in turns]
        assert [produced[i] for i in ends] == said
        assert not any(produced[i + 1] for i in ends if i + 1 < len(ids))


@each_template
def test_trap_5_context_only(renderer_of, template):
    """An answer that is not trained on is in the ids as before, and not in the mask."""
    renderer = renderer_of("sentencepiece", template)
    turns = [Turn("user", "a"), Turn("assistant", "b", trained=False)] * 2
    turns[-1] = turns[-1]._replace(trained=True)
    everything = [turn._replace(trained=True) for turn in turns]
    ids, produced = ids_and_mask(renderer, turns)
    all_ids, all_produced = ids_and_mask(renderer, everything)
    assert ids == all_ids
    second = all_produced.index(False, all_produced.index(True))
    assert not any(produced[:second]) and produced[second:] == all_produced[second:]


def test_llama3_ids_are_the_published_templates(chat_tokenizers):
    """By hand, from Meta's prompt format: what is between control tokens is one text."""
    tokenizer = chat_tokenizers["llama3"]
    vocabulary = ChatVocabulary(tokenizer)
    renderer = build_renderer("llama3", tokenizer)
    text = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4 of them.<|eot_id|>"
        "<|start_header_id|>ipython<|end_header_id|>\n\n{}<|eot_id|>"
    )
    turns = [Turn("user", " Hi there\n"), Turn("assistant", "4 of them."), Turn("tool", "{}")]
    ids, produced = ids_and_mask(renderer, turns)
    assert ids == tokenizer.encode(text)  # the backend looks for control tokens
    answer = [*tokenizer.encode("4 of them."), vocabulary.controls["<|eot_id|>"]]
    assert np.array(ids)[produced].tolist() == answer


def test_missing_tokens_are_named_first(tokenizer, chat_tokenizers):
    with pytest.raises(ConfigError, match=r"add_special_tokens\.py .*chatml, plain") as error:
        build_renderer("llama3", tokenizer)
    for token in ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"):
        assert f"needs the control token '{token}', which is not in" in str(error.value)
    assert build_renderer("plain", tokenizer).stop == tokenizer.eod


def test_a_marker_that_is_an_ordinary_token_is_refused(chat_configs, tmp_path):
    """A Hugging Face tokenizer may hold a marker as a token that every text may spell."""
    source = chat_configs["llama3"].model.read_text()
    head, mark, tail = source.partition('"content": "<|im_end|>"')
    path = tmp_path / "tokenizer.json"
    path.write_text(head + mark + tail.replace('"special": true', '"special": false', 1))
    config = chat_configs["llama3"].model_copy(
        update={"model": path, "end_of_document": "<|endoftext|>"}
    )
    with pytest.raises(ConfigError, match=r"'<\|im_end\|>', which is an ordinary piece"):
        build_renderer("chatml", load_tokenizer(config))


# --------------------------------------------------------------------- a template of one's own


TEACHING_WRONG = {
    "never learn": ("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
    "2 answers .* 0 ": ("{% if m.role == 'assistant' %}", "{% if false %}"),
    "asked otherwise": ("assistant\n{% endif -%}", "assistant: {% endif -%}"),
    "endfour": ("{% endfor", "{% endfour"),
}


@pytest.mark.parametrize("message", TEACHING_WRONG)
def test_a_template_that_teaches_wrong_is_refused(chat_tokenizers, tmp_path, message):
    path = tmp_path / "mine.jinja"
    path.write_text(MARKED.replace(*TEACHING_WRONG[message]))
    assert path.read_text() != MARKED
    with pytest.raises(ConfigError, match=message):
        build_renderer(JinjaTemplateConfig(jinja=path), chat_tokenizers["llama3"])


def test_earlier_turns_that_change_need_marks(chat_tokenizers, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(UNMARKED.replace("{{ m.role }}", "{{ m.role }}{{ '!' if loop.last }}"))
    with pytest.raises(ConfigError, match="otherwise once others follow"):
        build_renderer(JinjaTemplateConfig(jinja=path), chat_tokenizers["llama3"])


def test_a_released_template_of_other_ids_is_noticed(renderer_of, chat_tokenizers, tmp_path):
    """Without the two lines in tokenizer.json, then without the guard in the template."""
    renderer = renderer_of("sentencepiece", "chatml")
    write_tokenizer(chat_tokenizers["sentencepiece"], tmp_path, renderer=renderer)
    path, template = tmp_path / "tokenizer.json", tmp_path / "chat_template.jinja"
    whole, text = path.read_text(), template.read_text()
    for step in ("normalizer", "pre_tokenizer"):
        path.write_text(json.dumps(json.loads(whole) | {step: None}))
        with pytest.raises(ValueError, match="gives other ids than training"):
            check_same_chats(renderer, tmp_path, CHATS[:50])
    path.write_text(whole)
    check_same_chats(renderer, tmp_path, CHATS[:50])
    template.write_text(text.replace("_token[0] ~ ", "_token ~ '' if true else "))
    with pytest.raises(ValueError, match="gives other ids than training"):
        check_same_chats(renderer, tmp_path, CHATS[:50])


def test_plain_text_of_a_release_is_as_before(renderer_of, released, chat_tokenizers, texts):
    """The template's two lines in tokenizer.json change no ordinary text."""
    for name in TOKENIZERS:
        theirs, ours, splits = released(name, "chatml"), chat_tokenizers[name], name in PLAIN
        for text in texts[:80]:
            ids = theirs.encode(text, split_special_tokens=splits, add_special_tokens=False)
            assert ids == ours.encode(text)
        assert theirs.decode(ours.encode(texts[0])) == ours.decode(ours.encode(texts[0]))
