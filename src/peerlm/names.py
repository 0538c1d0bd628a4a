"""The names by which configurations say that a model, or its conversion, is ours."""

MODEL_TYPE = "peer"
"""The language model's `model_type`."""
CONVERTED = "peerlm"
"""What a converted model's configuration has as its `quant_method`."""
CONVERTED_EARLIER = "peerlm.surgery"
"""The same in folders of the first commits, which load as well."""
