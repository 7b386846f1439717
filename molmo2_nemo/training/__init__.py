"""What every host of the training needs, whoever runs the loop: no NeMo, no Lightning."""
