"""Text generation, classification and activations of a trained model."""

from gptjax.inference.activations import Activations, activations
from gptjax.inference.classifier import Classifier
from gptjax.inference.decoding import Decoder
from gptjax.inference.generator import Continuation, Generator, Prompt, Text, read_prompts
from gptjax.inference.sampling import Sampling, suppressed_ids, sample
