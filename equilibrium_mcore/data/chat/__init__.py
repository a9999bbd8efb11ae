"""Conversations: templates, masks, packed batches of fixed size, an order that resumes."""
