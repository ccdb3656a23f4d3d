-- The records as they are stored; false where there is none.
return each_job(load_stored)
