"""A server of a trained model: texts of many clients grow together in slots of one cache."""
