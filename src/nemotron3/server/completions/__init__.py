"""/v1/completions: texts or token ids in, their continuation out."""
