"From a simulated model to a verified file on a phone."
