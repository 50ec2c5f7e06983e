"""From a table of texts and labels to token batches, training, labelling, metrics and figures."""
