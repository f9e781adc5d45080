"""Training, scores and figures of the likelihood regret's experiment."""
