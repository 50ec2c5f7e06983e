"""Models as tools mark or copy them that spread a model over devices; one process is enough for it."""


def partitioned(model):
    """As DeepSpeed marks the parameters that it has partitioned."""
    for parameter in model.get_base_model().parameters():
        parameter.ds_id, parameter.ds_shape = 1, parameter.shape
    return model


def flattened(model):
    """As FSDP1 marks the parameters that it has flattened."""
    for parameter in model.get_base_model().parameters():
        parameter._fsdp_flattened = True
    return model


def cut_into_stages(model):
    """As accelerate's prepare_pippy marks a model."""
    model.get_base_model().hf_split_points = ["model.layers.1"]
    return model


def replica(model):
    """A copy of the model as nn.DataParallel makes one for each device in each step."""
    copies = {id(module): module._replicate_for_data_parallel() for module in model.modules()}
    for module in model.modules():
        copy = copies[id(module)]
        for name, child in module._modules.items():
            copy._modules[name] = copies[id(child)] if child is not None else None
        for name, parameter in module._parameters.items():
            setattr(copy, name, None if parameter is None else parameter.view_as(parameter))
    return copies[id(model)]
