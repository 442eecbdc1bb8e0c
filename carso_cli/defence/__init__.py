"""The paper's method, in its order: representation, conditioning, VAE, ELBO, aggregation, defended model."""
