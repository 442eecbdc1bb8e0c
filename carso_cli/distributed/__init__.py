"""Several processes: the world of torchrun, their rendezvous, batch statistics over all of them."""
