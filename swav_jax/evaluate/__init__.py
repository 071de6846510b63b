"""What a network has learned: features, kNN, clusters, and pictures of them."""
