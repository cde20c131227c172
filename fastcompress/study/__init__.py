"Pictures and experiments: where the weights lie, what a schedule did, which layer is the noisiest."
