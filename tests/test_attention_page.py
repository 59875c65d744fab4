"""The page of `lama attention`: it holds the numbers, escapes what tokens say, asks for nothing, and works in
a browser.
"""

import base64
import json
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from browser import Browser, needs_chromium
from helpers import SMALL, fill

import lama
from lama.cli import main
from lama.errors import LamaError
from lama.interp import page as pages
from lama.interp.attention import Attention, attention_of
from lama.interp.page import attention_page
from lama.models.encoder_decoder import Transformer, TransformerConfig
from lama.models.gpt import GPT, GPTConfig
from lama.tokenizers import CharacterTokenizer, PairTokenizer

HOSTILE = "</script><!--<script>{{meta}}\u2028&amp;'\"é"


def softmax_rows(shape, causal, seed=0):
    scores = np.random.default_rng(seed).normal(size=shape) * 2
    e = np.exp(scores) * (np.tri(*shape[-2:]) if causal else 1)
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def attention(labels, n_layers=2, n_heads=3, d=5):
    n, rng = len(labels), np.random.default_rng(1)
    q, k = (rng.normal(size=(n_layers, n_heads, n, d)).astype(np.float32) for _ in "qk")
    return Attention(
        "self", labels, labels, softmax_rows((n_layers, n_heads, n, n), True), q, k, d**-0.5, True
    )


@pytest.fixture(scope="module")
def found():
    return attention(["·a", "b", "</script>", "é", "·a", "{{style}}", "c"])


@pytest.fixture(scope="module")
def content(found):
    return attention_page({"self": found}, "a model", "self", 1, 2, HOSTILE)


def meta_of(content):
    return json.loads(
        re.search(r'<script type="application/json" id="meta">(.*?)</script>', content, re.DOTALL)[1]
    )


def chunk(content, name):
    packed = re.search(rf'<script type="text/plain" id="{name}">(.*?)</script>', content)[1]
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), np.uint8)


def test_page_holds_the_weights_to_a_65535th_and_nothing_of_what_is_ahead(content, found):
    for layer in range(2):
        high, low = chunk(content, f"p-0-{layer}").reshape(2, -1).astype(int)
        expected = found.patterns[layer][:, np.tri(7) > 0].ravel()  # head by head, row by row
        np.testing.assert_allclose((high * 256 + low) / 65535, expected, atol=0.5 / 65535 + 1e-9)


def test_page_holds_queries_and_keys_to_a_127th_of_their_largest(content, found):
    numbers = chunk(content, "v-0-1")
    n = 3 * 14  # heads x (queries and keys)
    vectors = numbers[: n * 5].view(np.int8).reshape(3, 14, 5) * numbers[n * 5 :].copy().view("<f4").reshape(
        3, 14, 1
    )
    expected = np.concatenate([found.q[1], found.k[1]], 1)
    assert (np.abs(vectors - expected) <= np.abs(expected).max(-1, keepdims=True) / 127 * 0.501).all()


def test_page_says_what_it_shows(content, found):
    meta = meta_of(content)
    assert meta["start"] == {"view": "head", "kind": 0, "layer": 1, "head": 2}
    (kind,) = meta["kinds"]
    assert kind["queries"] == kind["keys"] == found.queries
    assert (kind["layers"], kind["heads"], kind["d"], kind["causal"]) == (2, 3, 5, True)


def test_whatever_a_token_says_stays_text(content):
    class Reader(HTMLParser):
        def __init__(self):
            super().__init__()
            self.tags, self.texts = [], {}

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)

        def handle_data(self, data):
            last = (self.tags or [""])[-1]
            self.texts[last] = self.texts.get(last, "") + data

    reader = Reader()
    reader.feed(content)
    assert reader.tags.count("script") == 2 + 2 * 2  # meta and program; of each layer weights and vectors
    assert (
        reader.texts["title"].rstrip() == f"Attention: {HOSTILE}"
        and reader.texts["h1"].rstrip() == f"Attention · {HOSTILE}"
    )


def test_page_asks_for_nothing_from_anywhere(content):
    assert not re.findall(r"https?:|//\w+\.\w|@import|url\(", content)
    assert re.findall(r'(?:src|href)="([^"]*)"', content) == ["data:,"]
    assert "default-src 'none'" in content and "connect-src" not in content


def test_page_refuses_more_numbers_than_it_can_hold(found, monkeypatch):
    monkeypatch.setattr(pages, "LARGEST", 700)
    message = r"^a page must hold at most 0 MB of numbers; got 0 MB for 7 tokens and 2 x 3 heads\. "
    message += "Shorten the text, or write a picture: "
    with pytest.raises(LamaError, match=message):
        attention_page({"self": found}, "a model", "self")


def test_attention_writes_a_page_of_any_model(tmp_path, capfd):
    tokenizer = PairTokenizer(CharacterTokenizer("ab<"))
    shape = {
        "context_length": 13,
        "d_model": 6,
        "n_encoder_layers": 1,
        "n_decoder_layers": 2,
        "n_heads": 3,
        "d_mlp": 17,
    }
    model = Transformer(TransformerConfig(tokenizer.vocab_size, **shape), seed=None)
    fill(model)
    lama.save(tmp_path / "model", model, tokenizer)
    out = tmp_path / "page.html"
    assert main(f"attention -m {tmp_path / 'model'} ab< --target ba --layer 1 --out {out}".split()) == 0
    meta = meta_of(out.read_text("utf-8"))
    assert [kind["name"] for kind in meta["kinds"]] == [
        "the encoder's",
        "the decoder's",
        "decoder to encoder",
    ]
    assert meta["start"] == {"view": "head", "kind": 2, "layer": 1, "head": None}
    assert meta["kinds"][2]["queries"] == ["b", "a", "<end>"] and meta["kinds"][2]["keys"] == [
        "a",
        "b",
        "<",
        "<end>",
    ]
    assert "4 tokens, 3 heads" in capfd.readouterr().err


def test_page_of_additive_attention_has_no_vectors_to_multiply():
    model, tokenizer = GPT(GPTConfig(**SMALL, similarity="additive"), seed=None), CharacterTokenizer("abc")
    fill(model)
    content = attention_page(attention_of(model, tokenizer, tokenizer.encode("abca")), "a model", "self")
    assert (
        meta_of(content)["kinds"][0]["scale"] is None
        and 'id="p-0-1"' in content
        and 'id="v-0-1"' not in content
    )


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@needs_chromium
def test_page_works_in_a_narrow_browser(browser, content, found, tmp_path):
    path, pattern = tmp_path / "page.html", found.patterns[1, 2]
    path.write_text(content, "utf-8")
    browser.open(path, "#view=head&layer=1&head=2&query=6")
    over = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert (
        browser.run(over) == 0
        and browser.text("#readout") == "layer 1; 1 of 3 heads; lines for weights from 0.02"
    )
    browser.mouse("#query-4")
    best = int(pattern[4].argmax())
    assert browser.text("#readout").startswith(
        f"·a looks at, layer 1, head 2: {found.keys[best]} {pattern[4, best]:.3f}"
    )
    browser.mouse("#key-1")
    best = int(pattern[:, 1].argmax())
    assert (
        browser.text("#readout")
        == f"b (1) gets most attention from {found.keys[best]} ({best}) in head 2: {pattern[best, 1]:.3f}"
    )
    browser.mouse("#heads button", clicks=2)  # a double click leaves only that head
    chosen = "return [...document.querySelectorAll('#heads button')]"
    chosen += ".map((each) => each.getAttribute('aria-pressed') === 'true')"
    assert browser.run(chosen) == [True, False, False]

    browser.mouse('[data-view="matrix"]', clicks=1)
    browser.mouse('#heads [data-head="2"]', clicks=1)
    assert browser.run(over) == 0
    browser.run("document.querySelector('main canvas').focus()")
    browser.key("ArrowRight")
    browser.key("ArrowUp")
    assert (
        browser.text("#readout") == f"{found.queries[5]} (5) → b (1)   {pattern[5, 1]:.4f}   layer 1, head 2"
    )
    assert (
        browser.run("return [...document.querySelectorAll('.strip .token')].map((each) => each.textContent)")
        == found.queries
    )

    browser.mouse('[data-view="neuron"]', clicks=1)
    assert browser.run(over) == 0
    rows = "return [...document.querySelectorAll('.neurons .{}')].map((row) => row.textContent)"
    assert browser.run(rows.format("share")) == [f"{weight:.3f}" for weight in pattern[6]]
    scores = found.k[1, 2] @ found.q[1, 2, 6] * found.scale
    np.testing.assert_allclose(
        [float(score) for score in browser.run(rows.format("number"))], scores, atol=0.05
    )

    browser.mouse('[data-view="model"]', clicks=1)
    assert browser.run(over) == 0
    assert browser.run("return document.querySelectorAll('.thumb').length") == 6
    browser.mouse('.thumb[data-layer="0"][data-head="1"]', clicks=1)
    assert browser.text("#readout").startswith("layer 0; 1 of 3 heads")
    assert browser.complaints == []


@needs_chromium
def test_page_is_light_or_dark_as_the_system_is_until_it_is_told(browser, content, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(content, "utf-8")
    browser.open(path, dark=True)
    back = "return getComputedStyle(document.body).backgroundColor"
    dark = browser.run(back)
    browser.mouse("#theme", clicks=1)
    light = browser.run(back)
    brightness = [sum(int(value) for value in re.findall(r"\d+", colour)) for colour in (dark, light)]
    assert brightness[0] < 150 < 600 < brightness[1]
    assert browser.complaints == []


@needs_chromium
def test_page_of_a_long_text_draws_only_what_can_be_told_apart(browser, tmp_path):
    path, long = tmp_path / "page.html", attention([f"t{i}" for i in range(257)], 11, 12, 3)
    path.write_text(attention_page({"self": long}, "a model", "self"), "utf-8")
    browser.open(path)
    assert browser.text("#readout").startswith("layer 0; 1 of 12 heads; lines for weights from 0.0")
    count = "const line = Path2D.prototype.lineTo; window.drawn = 0; "
    browser.run(
        count
        + "Path2D.prototype.lineTo = "
        + "function (...place) { window.drawn += 1; return line.apply(this, place); };"
    )
    browser.mouse("#all", clicks=1)
    least = float(
        re.fullmatch(r"layer 0; 12 of 12 heads; lines for weights from (.*)", browser.text("#readout"))[1]
    )
    drawn = browser.run("return window.drawn")
    assert 0 < drawn <= 2000 and drawn == (np.rint(long.patterns[0] * 65535) >= least * 65535).sum()
    browser.mouse('[data-view="model"]', clicks=1)
    there = (
        "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((value) => value)"
    )
    thumbs = browser.run(f"return [...document.querySelectorAll('.thumb canvas')].map((canvas) => {there})")
    assert len(thumbs) == 132 and thumbs[0]
    assert browser.complaints == []
