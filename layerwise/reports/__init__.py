"""What people read: tables, progress, pages, pictures, model cards."""
