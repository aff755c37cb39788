"""The cache: keys, values, convolution and SSM states of all layers between calls."""
