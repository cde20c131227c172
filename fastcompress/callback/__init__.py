"The rest of the library as fastai callbacks: they say when, the other rooms say what."
