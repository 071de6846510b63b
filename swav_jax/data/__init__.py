"""Input: which images there are (`sources`) and how they reach the step (`pipeline`)."""

import os

# TensorFlow reads these as it is imported. Its log greets the user with pages of plug-ins and has a
# line for every damaged file (JAX, where it comes first, sets the level to 1), and oneDNN adds two
# lines that no level hides. With malloc, every batch of 50 MB is new memory that the kernel has to
# clear, which costs half as much as the decoding.
if os.environ.get('TF_CPP_MIN_LOG_LEVEL', '1') == '1':
    os.environ['TF_CPP_MIN_LOG_LEVEL'] = '3'
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
os.environ.setdefault('TF_CPU_ALLOCATOR_USE_BFC', '1')
