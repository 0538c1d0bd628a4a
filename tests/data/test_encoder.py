"""What tokenizers lose is counted by its reason; the pieces of a document have the tokens of the whole."""

import json
import warnings

import pytest
from tokenizers import Tokenizer, normalizers

from peerlm.data import tokenizer as tokenizer_module
from peerlm.data.encoder import TextEncoder
from peerlm.data.text_loss import TextLoss
from peerlm.data.tokenizer import encoder, pieces, train_tokenizer
from peerlm.errors import PeerlmWarning

TEXT = "river lantern 東moss Quiet"


def loss_of(tokenizer, *texts) -> TextLoss:
    text_encoder = TextEncoder(tokenizer)
    ids = text_encoder.encode(texts, [False] * len(texts))
    text_encoder.account(texts, ids, [False] * len(texts))
    return text_encoder.loss


@pytest.mark.parametrize(
    ("kind", "options", "lost"),
    [
        ("bytes", {}, {}),
        ("llama", {"byte_fallback": True}, {}),
        ("spaces", {}, {"dropped": 3 + 1}),  # 東 and Q
        ("spaces", {"unk": "<unk>"}, {"unknown": 3 + 1}),
        ("llama", {}, {"dropped": 3 + 1}),
        # a word is unknown as a whole, once it is in lower case
        ("bert", {"unk": "<unk>"}, {"unknown": 3, "altered": 1}),
    ],
)
def test_what_is_lost_is_counted_by_its_reason(make_tokenizer, kind, options, lost):
    loss = loss_of(make_tokenizer(kind, **options), TEXT)
    size = len(TEXT.encode())
    assert loss.read == size
    assert loss.shares == {reason: num_bytes / size for reason, num_bytes in lost.items()}


def test_white_space_that_does_not_come_back_has_a_reason_of_its_own(make_tokenizer):
    loss = loss_of(make_tokenizer("bert", unk="<unk>"), "river  moss\n\nquiet")
    assert loss.shares == {"spaces": 2 / 18}


@pytest.mark.parametrize(
    ("normalizer", "text", "lost"),
    [
        (normalizers.Lowercase(), "River Moss", {"altered": 2 / 10}),
        (normalizers.NFKC(), "moss ² ﬁ", {"altered": 5 / 11}),
        (normalizers.NFC(), "moss e\u0301", {"altered": 3 / 8}),
        (normalizers.NFC(), "moss \u00e9", {}),
        (normalizers.Strip(), " moss ", {"spaces": 2 / 6}),
    ],
)
def test_a_normaliser_alters_text(make_tokenizer, normalizer, text, lost):
    tokenizer = make_tokenizer("bytes")
    tokenizer.backend_tokenizer.normalizer = normalizer
    assert loss_of(tokenizer, text).shares == pytest.approx(lost)


def test_a_prefix_space_is_no_loss(make_tokenizer):
    for kind, options in (("spaces", {}), ("llama", {"byte_fallback": True})):
        assert loss_of(make_tokenizer(kind, **options), "river moss", " river moss").shares == {}


def test_a_tokenizer_without_a_decoder_is_not_taken_for_one_that_loses_text(make_tokenizer):
    for kind in ("bytes", "spaces"):
        tokenizer = make_tokenizer(kind)
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state | {"decoder": None}))
        assert loss_of(tokenizer, "river lantern moss").shares == {}
        assert loss_of(tokenizer, "river 東").shares == ({} if kind == "bytes" else {"dropped": 3 / 9})


def test_dropped_bytes_are_told_for_each_text(make_tokenizer):
    text_encoder = TextEncoder(make_tokenizer("spaces"))
    texts = ["river", "東 moss", "moss 東京"]
    ids = text_encoder.encode(texts, [False] * 3)
    assert text_encoder.account(texts, ids, [False] * 3) == [0, 3, 6]
    assert text_encoder.loss.examples["dropped"] == {"東": 2, "京": 1}


def test_a_warning_has_the_share_and_examples(make_tokenizer):
    text_encoder = TextEncoder(make_tokenizer("spaces"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text_encoder.warn("a.txt")
    ids = text_encoder.encode([TEXT], [False])
    text_encoder.account([TEXT], ids, [False])
    with pytest.warns(PeerlmWarning, match=r"no token for 14\.8% of a\.txt \(such as '東' 'Q'\)"):
        text_encoder.warn("a.txt")


@pytest.mark.parametrize("kind", ["bytes", "spaces", "llama"])
def test_pieces_of_a_document_have_the_tokens_of_the_whole(make_tokenizer, kind, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 40)
    tokenizer = make_tokenizer(kind, byte_fallback=kind == "llama")
    text = "river lantern moss quiet copper ladder winter orchard " * 9
    texts = list(pieces(text))
    continues = [number > 0 for number in range(len(texts))]
    text_encoder = TextEncoder(tokenizer)
    found = text_encoder.encode(texts, continues)
    assert len(texts) > 9
    assert [token for ids in found for token in ids] == tokenizer(text, add_special_tokens=False).input_ids
    text_encoder.account(texts, found, continues)
    assert text_encoder.loss.shares == {}


def test_a_piece_that_begins_within_a_word_gets_no_space(make_tokenizer):
    text_encoder = TextEncoder(make_tokenizer("llama", byte_fallback=True))
    (ids,) = text_encoder.encode(["river"], [True])
    assert text_encoder.rest.decode(ids) == "river"
    assert text_encoder.encode(["river"], [False]) != [ids]


def test_offsets_have_the_space_before_a_token():
    from tokenizers import processors

    tokenizer = train_tokenizer(["river moss"] * 3, 300)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert encoder(tokenizer).encode("river moss").offsets[-1][0] == 5
