"""How many prototypes images can fill, for recipes, the plan and the report."""

# For each image of the batch and the queue: lightly trains CIFAR-10 with 512 in a batch of 128, the
# demo learns alike with up to 200 in a batch of 64; with more, codes spread over chance prototypes.
MOST_PROTOTYPES_PER_IMAGE = 4
