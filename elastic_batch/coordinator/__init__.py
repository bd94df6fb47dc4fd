"""The service that decides who trains: membership, journal, server. It does not import torch."""
