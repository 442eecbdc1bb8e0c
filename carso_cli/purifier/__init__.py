"""The conditional VAE: conditioning, encoder, decoder, loss, schedules."""
