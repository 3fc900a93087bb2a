"""What trainers of other people need of us; each framework is imported by the module that is named for it."""
