"""The words that device, region and cloud speak: messages, topics, vocabulary, errors. No decisions live here."""
