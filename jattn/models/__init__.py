"""Whole models, one readable file each, and ways to decode from them."""

from jattn.models import decoding as decoding
from jattn.models import seq2seq as seq2seq
from jattn.models.decoding import Decoded as Decoded
from jattn.models.decoding import beam_search as beam_search
from jattn.models.decoding import greedy as greedy
from jattn.models.seq2seq import Seq2Seq as Seq2Seq
