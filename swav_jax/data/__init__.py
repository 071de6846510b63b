"""Input, from the name of a source to batches of images.

sources       the kinds of sources, each opened by a module of its own: folders, filelists,
              webdataset, tfds, torchvision_files (with matlab); in_memory for a program's images
images        how images are stored, and the digest of a source
listing       notes on what is left out, and listings kept between runs; names: of files
pipeline      batches for training and evaluation, with the boxes of their crops (boxes)
decode        images in a tf.data graph; pillow and resize for what TensorFlow does not read
bad_images    the list of unreadable images
"""
