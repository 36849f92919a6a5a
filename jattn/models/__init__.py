"""Whole models, one readable file each, and ways to decode from them."""

from jattn.models import bahdanau as bahdanau
from jattn.models import causal_lm as causal_lm
from jattn.models import char_rnn as char_rnn
from jattn.models import classifier as classifier
from jattn.models import decoding as decoding
from jattn.models import feature_encoder as feature_encoder
from jattn.models import generation as generation
from jattn.models import luong as luong
from jattn.models import sampling as sampling
from jattn.models import tokens as tokens
from jattn.models import transformer as transformer
from jattn.models.bahdanau import BahdanauTranslator as BahdanauTranslator
from jattn.models.causal_lm import CausalLM as CausalLM
from jattn.models.char_rnn import CharCell as CharCell
from jattn.models.char_rnn import CharRNN as CharRNN
from jattn.models.char_rnn import EmbeddedCharRNN as EmbeddedCharRNN
from jattn.models.classifier import Classifier as Classifier
from jattn.models.decoding import Decoded as Decoded
from jattn.models.decoding import beam_search as beam_search
from jattn.models.decoding import greedy as greedy
from jattn.models.feature_encoder import FeatureClassifier as FeatureClassifier
from jattn.models.feature_encoder import FeatureEncoder as FeatureEncoder
from jattn.models.luong import LuongTranslator as LuongTranslator
from jattn.models.transformer import TransformerTranslator as TransformerTranslator
