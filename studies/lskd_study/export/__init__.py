"""`lskd export`: a run's network as a folder to take away."""
