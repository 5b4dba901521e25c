"""The place of the fairseq plugin. Nothing is here yet; `lskd doctor` says so."""
