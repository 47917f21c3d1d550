"""Tokenizers, which convert any text to ids and back without loss."""

from gptjax.data.tokenizers.published import HuggingFaceTokenizer, SentencePieceModel
from gptjax.data.tokenizers.subwords import Gpt2Tokenizer, SentencePieceTokenizer, VocabularyError, Words, load_tokenizer, train_tokenizer
from gptjax.data.tokenizers.tokenizer import HEADINGS, ByteTokenizer, CharTokenizer, TextStream, Tokenizer
