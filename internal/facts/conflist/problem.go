package conflist

import (
	"fmt"
	"strings"
)

// Problem is one thing that is wrong with the configuration of fathom-cni.
type Problem struct {
	Path    string // such as pools[0].ranges[1]
	Value   string
	Message string // what is wrong, and what would be right
}

func (p Problem) String() string {
	var b strings.Builder
	if p.Path != "" {
		b.WriteString(p.Path + ": ")
	}
	if p.Value != "" {
		fmt.Fprintf(&b, "%q: ", p.Value)
	}
	b.WriteString(p.Message)
	return b.String()
}

// InvalidError holds every problem that was found.
type InvalidError struct{ Problems []Problem }

func (e *InvalidError) Error() string {
	var all []string
	for _, p := range e.Problems {
		all = append(all, p.String())
	}
	return strings.Join(all, "; ")
}

type problems []Problem

func (ps *problems) add(path, value, format string, args ...any) {
	*ps = append(*ps, Problem{path, value, fmt.Sprintf(format, args...)})
}
