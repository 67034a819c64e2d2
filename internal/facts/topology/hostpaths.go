package topology

// hostPath is a path of the host that a lab file names, and where.
type hostPath struct {
	path  string
	named text
}

// hostPath notes that the lab needs a path of the host. Nothing here looks whether it is there: CheckHostPaths does.
func (b *builder) hostPath(path string, named text) {
	b.hostPaths = append(b.hostPaths, hostPath{path, named})
}

// CheckHostPaths has check look at each path of the host that the lab file names: one that is not there would stop the lab
// half-way. An error that is about what the user wrote is an *InvalidError with every problem in it.
func (l *Lab) CheckHostPaths(check func(path string) error) error {
	var ps problems
	for _, p := range l.hostPaths {
		if err := check(p.path); err != nil {
			ps.add(p.named.at, p.named.value, "%s", err)
		}
	}
	return ps.err()
}
