package topology

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing that is wrong with a lab file or with a flag.
type Problem struct {
	File   string // empty for a problem of a flag
	Line   int    // from 1; 0 when the problem has no place in the file
	Column int    // from 1
	// Field is the path of the field, such as clusters[0].podCIDR, or the flag, such as --workers.
	Field string
	// Value is what was written there; empty when nothing was, or when it was no single value.
	Value string
	// Allowed says what is wrong and what would be right.
	Allowed string
}

// String writes the problem the way compilers do, so that editors can jump to its place.
func (p Problem) String() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File)
		if p.Line > 0 {
			fmt.Fprintf(&b, ":%d:%d", p.Line, p.Column)
		}
		b.WriteString(": ")
	}
	if p.Field != "" {
		b.WriteString(p.Field)
		b.WriteString(": ")
	}
	if p.Value != "" {
		fmt.Fprintf(&b, "%q: ", p.Value)
	}
	b.WriteString(p.Allowed)
	return b.String()
}

// InvalidError holds every problem that was found, in the order of the file; flags come last.
type InvalidError struct {
	Problems []Problem
}

// Error lists all problems, one a line.
func (e *InvalidError) Error() string {
	if len(e.Problems) == 1 {
		return e.Problems[0].String()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "the lab has %d problems:", len(e.Problems))
	for _, p := range e.Problems {
		b.WriteString("\n  ")
		b.WriteString(p.String())
	}
	return b.String()
}

// IsInvalid says whether err is about what the user wrote, in the lab file or in flags.
func IsInvalid(err error) bool {
	var invalid *InvalidError
	return errors.As(err, &invalid)
}

// source is where a value was written: a place in the file, a flag, or neither for a default.
type source struct {
	file         string
	line, column int
	field        string
}

// child returns the place of something inside s that has no place of its own, such as a missing field.
func (s source) child(field string) source {
	if s.field != "" {
		field = s.field + "." + field
	}
	s.field = field
	return s
}

// isFlag reports whether the value came from the command line.
func (s source) isFlag() bool { return strings.HasPrefix(s.field, "--") }

// String names the place in a sentence about another place.
func (s source) String() string {
	if s.line > 0 {
		return fmt.Sprintf("%s of line %d", s.field, s.line)
	}
	return s.field
}

// problems collects what is wrong. A default that several clusters inherit is complained about once.
type problems struct {
	list []Problem
	seen map[Problem]bool
}

func (ps *problems) add(at source, value, format string, args ...any) {
	p := Problem{
		File: at.file, Line: at.line, Column: at.column, Field: at.field,
		Value: value, Allowed: fmt.Sprintf(format, args...),
	}
	if ps.seen[p] {
		return
	}
	if ps.seen == nil {
		ps.seen = map[Problem]bool{}
	}
	ps.seen[p] = true
	ps.list = append(ps.list, p)
}

// err returns nil when nothing was wrong.
func (ps *problems) err() error {
	if len(ps.list) == 0 {
		return nil
	}
	slices.SortStableFunc(ps.list, func(a, b Problem) int {
		aFlag, bFlag := strings.HasPrefix(a.Field, "--"), strings.HasPrefix(b.Field, "--")
		if aFlag != bFlag {
			if aFlag {
				return 1
			}
			return -1
		}
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	return &InvalidError{Problems: ps.list}
}
