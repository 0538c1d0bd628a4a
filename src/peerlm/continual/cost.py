"""What a step of learning costs where part of the model is frozen."""

from torch import nn

from peerlm.accounting import model_cost


def training_flops_per_token(model: nn.Module, context: int) -> int:
    """FLOPs of a forward and a backward pass per token: three forward passes, less what frozen weights save.

    Activations get gradients throughout, which takes as long as the forward pass; weights get them where they are
    trained. What does not need gradients because nothing before it is trained is counted all the same.
    """
    return 2 * model_cost(model, context).forward_flops_per_token + _flops_of_trained(model, context)


def _flops_of_trained(model: nn.Module, context: int) -> int:
    """Forward FLOPs per token of modules with trained weights, or, as attention's products, without any."""
    flops = 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.requires_grad:
            flops += 2 * module.in_features * module.out_features
        if extra := getattr(module, "extra_flops_per_token", None):
            parts = [module, *(part for part in module.children() if not _counts_itself(part))]
            weights = [weight for part in parts for weight in part.parameters(recurse=part is not module)]
            if not weights or any(weight.requires_grad for weight in weights):
                flops += extra(context)
    return flops


def _counts_itself(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "extra_flops_per_token")
